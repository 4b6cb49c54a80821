"""The tables of an explanation: what is held, what each layer gets, what a compression moves."""

from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table

from kvpolicy.plan.explain.devices import Device
from kvpolicy.plan.explain.steps import Step
from kvpolicy.plan.explain.units import human_bytes


def memory_table(
    sizes: Mapping[str, int], full: int, columns: Mapping[str, float], *, evicts: bool, whole_prompt: bool
) -> Table:
    """Bytes by what they are held for, as shares of a full cache, and the bytes of one entry by column."""
    table = Table("", "bytes", "of a full cache", title="Memory")
    for name, count in {"full cache": full, **sizes}.items():
        table.add_row(name, human_bytes(count), f"{count / full:.1%}")
    per_column = ", ".join(f"{name} {count:g}" for name, count in columns.items())
    table.caption = f"{sum(columns.values()):g} bytes per entry and KV head:\n{per_column}"
    if not evicts:
        table.caption += "\nnothing is evicted up to this length"
    elif whole_prompt:
        table.caption += "\nall layers hold all of a prompt until it is compressed"
    return table


def budgets_table(
    layers: Sequence[tuple[int, int, int]], sinks: int, recent: int, *, competing: bool, at_most: bool
) -> Table:
    """Index, budget and capacity of each layer; neighbours that have the same are one line."""
    table = Table("layers", "budget", "capacity", title="Entries per KV head")
    runs: list[list[tuple[int, int, int]]] = []
    for layer in layers:
        if runs and runs[-1][-1][1:] == layer[1:]:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    for run in runs:
        (first, budget, capacity), last = run[0], run[-1][0]
        table.add_row(str(first) if first == last else f"{first} to {last}", str(budget), str(capacity))
    table.caption = f"protected: {sinks} sinks\nand the newest {recent}"
    if competing:
        table.caption += "\nlayers compete: averages"
    if at_most:
        table.caption += "\nat most: scores may leave less"
    return table


def steps_table(steps: Sequence[Step], moved: int, unfused: str, rates: Device | None) -> Table:
    """Bytes of every step; with launches where kernels run, and with floors for a device whose rates are known."""
    title = f"One compression of one layer: {human_bytes(moved)} moved"
    table = Table("step", "plugin", "runs as", "reads", "bytes read", "bytes written", title=title)
    if not unfused:
        table.add_column("launches")
    if rates is not None:
        table.add_column(f"floor on {rates.name}")
    for step in steps:
        numbers = [human_bytes(step.read), human_bytes(step.written)]
        numbers += [] if unfused else [str(step.launches)]
        numbers += [] if rates is None else [f"{1e6 * rates.floor(step.read + step.written):.2f} µs"]
        table.add_row(step.stage, step.plugin, step.implementation, ", ".join(step.columns), *numbers)
    table.caption = "\n".join(_remarks(steps, unfused))
    return table


def _remarks(steps: Sequence[Step], unfused: str) -> Iterator[str]:
    """Why what is not fused is not, and what else a table has no room for."""
    yield f"runs in torch: {unfused}" if unfused else "one launch serves all layers of a decode step"
    for step in steps:
        if step.reason:
            yield f"{step.stage} {step.plugin}: {step.reason}"
