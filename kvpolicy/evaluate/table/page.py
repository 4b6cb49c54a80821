"""The record of an evaluation as a page of the documentation: every number in it is from the record."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kvpolicy.evaluate.table.prose import DECODE, HEAD, LOSSES, MERGE, METHOD, SETTING

TableData = Mapping[str, Any]


def page_of(record: TableData) -> str:
    """The whole page as Markdown."""
    return "\n".join(_page(record)).rstrip() + "\n"


def _page(record: TableData) -> Iterator[str]:
    setup = record["setup"]
    yield HEAD
    yield SETTING.format(**record["versions"], **record["machine"], **setup, **_run(record))
    yield "![Accuracy against bytes](../images/evaluation-accuracy.png)\n"
    yield "## Policies\n"
    yield from _policies(record)
    yield from _refusals(record["policies"])
    yield METHOD.format(**setup, full=_full_entry(record), seen=_seen(setup["tasks"]))
    if record["mergers"]:
        yield "## Merging against dropping\n"
        yield MERGE.format(one=1 / setup["items_per_task"])
        yield from _mergers(record)
        yield from _losses(record)
        yield from _refusals(record["mergers"])
    yield "## Time of a decode step\n"
    yield DECODE.format(**setup["decode"], percent=percent(setup["decode"]["share"]))
    yield "![Decode time against length](../images/evaluation-time.png)\n"
    yield from _decode(record)
    yield from _refusals(record["decode"])


def _policies(record: TableData) -> Iterator[str]:
    tasks = list(record["setup"]["tasks"])
    yield from _heading("policy", "share", "held", "bytes an entry", *tasks, "error", "worst layer")
    for one in _measured(record["policies"]):
        yield _row(one["policy"], _share(one), percent(one["held_share"]), _entry(one), *_answers(one), *_errors(one))
    yield ""


def _mergers(record: TableData) -> Iterator[str]:
    yield from _heading("policy", "share", "merge", *record["setup"]["tasks"], "error", "worst layer")
    dropped = _dropped(record)
    for one in _measured(record["mergers"]):
        better = _right(one) > dropped.get((one["policy"], one["share"]), 1.0)
        name = f"**{one['merge']}**" if better else one["merge"]
        yield _row(one["policy"], _share(one), name, *_answers(one), *_errors(one))
    yield ""


def _losses(record: TableData) -> Iterator[str]:
    """How often each merger does better and worse than dropping."""
    dropped = _dropped(record)
    yield LOSSES
    yield from _heading("merge", "more right", "fewer right", "smaller error", "larger error")
    errors = {_place(one): one["attention_error"]["mean"] for one in _measured(record["mergers"]) if _drops(one)}
    for merge in dict.fromkeys(one["merge"] for one in _measured(record["mergers"]) if not _drops(one)):
        own = [one for one in _measured(record["mergers"]) if one["merge"] == merge and _place(one) in dropped]
        right = [_right(one) - dropped[_place(one)] for one in own]
        error = [one["attention_error"]["mean"] - errors[_place(one)] for one in own]
        yield _row(merge, *map(str, (*_signs(right), *reversed(_signs(error)))))
    yield ""


def _decode(record: TableData) -> Iterator[str]:
    lengths = record["setup"]["decode"]["lengths"]
    found = {(one["policy"], one["length"]): one for one in _measured(record["decode"])}
    yield from _heading("policy", *(f"{length} tokens" for length in lengths))
    for name in dict.fromkeys(name for name, _ in found):
        cells = (found.get((name, length)) for length in lengths)
        yield _row(name, *("" if one is None else _time(one) for one in cells))
    yield ""


def _refusals(lines: Iterable[TableData]) -> Iterator[str]:
    """Each reason once."""
    reasons: dict[str, list[str]] = {}
    for one in lines:
        if "refusal" in one:
            place = f" at {one['length']} tokens" if "length" in one else f" {percent(one['share'])}"
            reasons.setdefault(one["refusal"], []).append(f"{one['policy']} {one.get('merge', '')}".strip() + place)
    for reason, names in reasons.items():
        yield f"Not measured: {', '.join(names)}: {reason}\n"


# -- cells -----------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """`"12.5%"`."""
    return f"{100 * share:.3g}%"


def _share(one: TableData) -> str:
    if one["kind"] == "whole":
        return "all"
    return percent(one["share"]) if one["kind"] == "budget" else f"reads {percent(one['read_share'])}"


def _entry(one: TableData) -> str:
    return f"{one['bytes_per_entry']:.1f} ({one['bytes_per_entry_by_formula']:.1f})"


def _answers(one: TableData) -> list[str]:
    return [f"{task['accuracy']:.0%} ({task['share_before_first_mistake']:.0%})" for task in one["tasks"].values()]


def _errors(one: TableData) -> tuple[str, str]:
    error = one["attention_error"]
    return f"{error['mean']:.3f}", f"{error['worst_layer']:.3f}"


def _time(one: TableData) -> str:
    return f"{one['ratio']:.2f} ({one['step_ms'] + one['compression_ms']:.1f} of {one['full_ms']:.1f} ms)"


# -- what is compared ------------------------------------------------------------------------------------------


def _measured(lines: Iterable[TableData]) -> list[TableData]:
    return [one for one in lines if "refusal" not in one]


def _right(one: TableData) -> float:
    shares = [task["share_before_first_mistake"] for task in one["tasks"].values()]
    return float(sum(shares) / len(shares))


def _drops(one: TableData) -> bool:
    return bool(one["merge"] == "drop")


def _place(one: TableData) -> tuple[str, float]:
    return one["policy"], one["share"]


def _dropped(record: TableData) -> dict[tuple[str, float], float]:
    return {_place(one): _right(one) for one in _measured(record["mergers"]) if _drops(one)}


def _signs(differences: Sequence[float]) -> tuple[int, int]:
    """How many are above and how many are below zero."""
    return sum(one > 0 for one in differences), sum(one < 0 for one in differences)


def _run(record: TableData) -> dict[str, Any]:
    return {"date": record["date"], "minutes": max(1, round(record["seconds"] / 60))}


def _full_entry(record: TableData) -> float:
    measured = _measured(record["policies"])
    return float(measured[0]["bytes_per_entry_of_a_full_cache"]) if measured else 0.0


def _seen(tasks: Mapping[str, TableData]) -> str:
    seen = [f"`{task}`" for task, about in tasks.items() if about["question_visible_to_scorers"]]
    return f"Scorers see the question while they compress the context in: {', '.join(seen) or 'no task'}."


def _heading(*cells: str) -> Iterator[str]:
    yield _row(*cells)
    yield "|" + "---|" * len(cells)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
