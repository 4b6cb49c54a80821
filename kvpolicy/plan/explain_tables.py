"""An explanation as rich tables: memory, budgets, steps."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from kvpolicy.plan.units import human_bytes

if TYPE_CHECKING:
    from kvpolicy.plan.explain import Explanation


def tables_of(one: "Explanation") -> tuple[Text | Table, ...]:
    """What is held, what each layer gets, what a compression moves."""
    where = f"one sequence of {one.length} tokens, {one.dtype} on {one.rates.name if one.rates else one.device}"
    raised = f"\n{one.raised}" if one.raised else ""
    return Text(f"policy {one.policy} ({one.digest}): {where}{raised}"), _memory(one), _budgets(one), _steps(one)


def _memory(one: "Explanation") -> Table:
    table = Table("", "bytes", "of a full cache", title="Memory")
    rows = {
        "full cache": one.full_bytes,
        "entries held, at capacity": one.held_bytes,
        "queries observed": one.window_bytes,
        "carried beside them": one.state_bytes,
        "layers with a sliding window": one.stock_bytes,
        "held in all": one.total_bytes,
    }
    optional = ("carried beside them", "layers with a sliding window")
    for name, count in rows.items():
        if count or name not in optional:
            table.add_row(name, human_bytes(count), f"{count / one.full_bytes:.1%}")
    per_column = ", ".join(f"{name} {count:g}" for name, count in one.columns.items())
    table.caption = f"{one.entry_bytes:g} bytes per entry and KV head:\n{per_column}"
    if not one.evicts:
        table.caption += "\nnothing is evicted up to this length"
    return table


def _budgets(one: "Explanation") -> Table:
    table = Table("layers", "budget", "capacity", title="Entries per KV head")
    first = 0
    for last, layer in enumerate(one.layers):
        after = one.layers[last + 1 : last + 2]
        if after and (after[0].budget, after[0].capacity) == (layer.budget, layer.capacity):
            continue
        start = one.layers[first].layer
        name = str(start) if start == layer.layer else f"{start} to {layer.layer}"
        table.add_row(name, str(layer.budget), str(layer.capacity))
        first = last + 1
    sinks, recent = one.protected
    table.caption = f"protected: {sinks} sinks\nand the newest {recent}"
    if one.competing:
        table.caption += "\nlayers compete: averages"
    return table


def _steps(one: "Explanation") -> Table:
    title = f"One compression of one layer: {human_bytes(one.moved_bytes)} moved"
    table = Table("step", "plugin", "runs as", "reads", "bytes read", "bytes written", title=title)
    if not one.unfused:
        table.add_column("launches")
    if one.rates is not None:
        table.add_column(f"floor on {one.rates.name}")
    for step in one.steps:
        numbers = [human_bytes(step.read), human_bytes(step.written)]
        numbers += [] if one.unfused else [str(step.launches)]
        floor = one.floor(step)
        numbers += [] if floor is None else [f"{floor:.2f} µs"]
        table.add_row(step.stage, step.plugin, step.implementation, ", ".join(step.columns), *numbers)
    table.caption = "\n".join(_remarks(one))
    return table


def _remarks(one: "Explanation") -> Iterator[str]:
    """Why what is not fused is not, and what else a table has no room for."""
    if one.unfused:
        yield f"runs in torch: {one.unfused}"
    else:
        yield "one launch serves all layers of a decode step"
    for step in one.steps:
        if step.reason:
            yield f"{step.stage} {step.plugin}: {step.reason}"
