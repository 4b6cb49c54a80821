"""Between the store of a layer and the pipeline: what a plugin is shown, and how its answer is laid down."""

from collections.abc import Sequence

from torch import Tensor

from kvpolicy.plan.pipeline import Compressed
from kvpolicy.plan.plan import ATTENTION, LOG_VOTES, POSITIONS, Plan
from kvpolicy.runtime.layout import Layout
from kvpolicy.runtime.store import Store
from kvpolicy.runtime.window import Window
from kvpolicy.stages import View
from kvpolicy.stages.slots import gather, indices_of


def view_of(plan: Plan, store: Store, window: Window, rows: Sequence[int], *, layer: int, scaling: float) -> View:
    """What a plugin sees of some rows of a layer, copied only where segments differ; the rows must hold no pads."""
    columns = {name: store.padded(name, rows) for name in plan.columns}
    keys, values = plan.spec.store.decode({name: columns[name] for name in plan.entry_columns})
    queries, query_positions = window.last(rows)
    shown = {*plan.entry_columns, POSITIONS, ATTENTION, LOG_VOTES}
    return View(
        keys=keys,
        values=values,
        positions=columns[POSITIONS],
        geometry=plan.geometry,
        scaling=scaling,
        layer=layer,
        sinks=plan.spec.protect.sinks,
        recent=plan.spec.protect.recent,
        queries=queries,
        query_positions=query_positions,
        attention=columns[ATTENTION].transpose(-1, -2) if ATTENTION in columns else None,
        log_votes=columns.get(LOG_VOTES),
        slot_state={name: column for name, column in columns.items() if name not in shown},
    )


def lay_down(plan: Plan, store: Store, rows: Sequence[int], result: Compressed, limit: int) -> None:
    """Replace the contents of the rows by what a compression left of them."""
    fresh = plan.spec.store.encode(result.entries.keys, result.entries.values) | result.slot_state
    if result.entries.log_votes is not None:
        fresh[LOG_VOTES] = result.entries.log_votes
    _replace(plan, store, rows, fresh, result.kept, limit)


def drop_pads(plan: Plan, store: Store, limit: int) -> None:
    """Close the gaps that pads have left in every row."""
    rows = range(store.layout.rows)
    _replace(plan, store, rows, {}, indices_of(store.padded(POSITIONS, rows) >= 0), limit)


def _replace(plan: Plan, store: Store, rows: Sequence[int], fresh: dict[str, Tensor], kept: Tensor, limit: int) -> None:
    moved = {name: gather(store.padded(name, rows), kept) for name in plan.columns if name not in fresh}
    lengths = tuple(tuple(counts) for counts in (kept >= 0).sum(-1).tolist())
    after = list(store.lengths)
    for row, counts in zip(rows, lengths, strict=True):
        after[row] = counts
    store.replace(rows, {**moved, **fresh}, lengths, _layout(plan, after, limit))


def _layout(plan: Plan, lengths: Sequence[Sequence[int]], limit: int) -> Layout:
    slack = plan.budgets.slack
    if plan.ragged:
        return Layout(tuple(tuple(length + slack for length in row) for row in lengths))
    longest = max(max(row) for row in lengths)
    return Layout.even(len(lengths), len(lengths[0]), max(longest, min(longest + slack, limit)))
