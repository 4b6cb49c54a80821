"""Results as tables: a line per variant, the same cells for a terminal and for Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvpolicy.bench.protocol.case import AGAIN, OURS, Case
from kvpolicy.bench.protocol.result import Result
from kvpolicy.plan.explain.units import human_bytes

HEADINGS = ("policy", "tokens", "variant", "p50", "p99", "ours", "floor", "peak")


def rows_of(cases: Sequence[Case]) -> Iterator[tuple[str, ...]]:
    """One line per variant; a variant that was timed twice is one line, with its noise."""
    for case in cases:
        for name in case.samples:
            if name != AGAIN:
                yield (case.what, str(case.length), name, *_times(case, name), _peak(case, name))


def human_seconds(seconds: float) -> str:
    """`"13.7 ms"`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def setting_of(result: Result) -> str:
    """One paragraph: where and with what the numbers were made."""
    versions, machine = result.environment["versions"], result.environment["machine"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("kvpolicy", "torch", "triton", "transformers", "python"))
    gpu = f"; {machine['accelerator']}" if "accelerator" in machine else ""
    threads = f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores{gpu}"
    options = ", ".join(f"{name} {_listed(value)}" for name, value in result.options.items())
    return f"{result.date}; {named}; {threads}. {options}."


def markdown(result: Result) -> str:
    """The whole result as a page."""
    lines = [f"# kvpolicy bench {result.name}", "", setting_of(result), ""]
    for part, cases in result.parts.items():
        lines += [f"## {part}", "", _line(HEADINGS), "|" + "---|" * len(HEADINGS), *map(_line, rows_of(cases)), ""]
    lines += [f"{name}: {_listed(fact)}\n" for name, fact in result.facts.items()]
    if result.left_out:
        lines += ["Not measured:", "", *(f"- {missing['what']}: {missing['why']}" for missing in result.left_out), ""]
    return "\n".join(lines)


def _times(case: Case, name: str) -> tuple[str, ...]:
    floor = case.of_floor(name)
    return (
        human_seconds(case.seconds(name)),
        human_seconds(case.tail(name)),
        _compared(case, name),
        "" if floor is None else f"{floor:.0%}",
    )


def _compared(case: Case, name: str) -> str:
    if name == OURS:
        return "" if case.noise is None else f"±{case.noise:.1%}"
    return f"{case.ratio(name):.2f}x" if OURS in case.samples else ""


def _peak(case: Case, name: str) -> str:
    peaks: Mapping[str, float] = case.facts.get("peak_bytes", {})
    return human_bytes(peaks[name]) if name in peaks else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _listed(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_listed(part)}" for name, part in value.items())
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
