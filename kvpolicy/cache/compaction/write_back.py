"""Builds the view of a layer from its storage, and writes what a compression left of it back."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from kvpolicy.cache.compaction.compaction_plan import Move
from kvpolicy.cache.observation_window import Window
from kvpolicy.cache.request_spans import RequestSpans
from kvpolicy.cache.storage.layer_storage import Holdings
from kvpolicy.cache.storage.layout import Layout
from kvpolicy.cache.storage.segment_index import Rows
from kvpolicy.plan.compress.step import Compressed
from kvpolicy.plan.forward_observers import ATTENTION
from kvpolicy.plan.plan import LOG_VOTES, POSITIONS, Plan
from kvpolicy.stages import View
from kvpolicy.stages.slots import by_position, indices_of, take

_ROOM = 1024  # slots that a compression may leave room for, however few entries stay


def view_of(
    plan: Plan,
    held: Holdings,
    window: Window,
    rows: Sequence[int],
    *,
    layer: int,
    protected: tuple[int, int],
    scaling: float,
    row_state: Mapping[str, Tensor],
    in_order: bool,
    spans: RequestSpans,
) -> View:
    """What a plugin sees of some rows of a layer, copied only where segments differ; the rows must hold no pads.

    `protected` are the sinks and the recent entries of each of the rows.

    What is packed is unpacked here: this one layer exists in full precision while it is compressed.
    """
    at = Rows(rows)
    columns = {name: held.slots.padded(name, rows) for name in plan.columns}
    positions = columns.pop(POSITIONS)
    attention, votes = columns.pop(ATTENTION, None), columns.pop(LOG_VOTES, None)
    queries, query_positions = window.last(rows)
    return View(
        keys=held.keys.read(at, 0, positions.shape[2], positions),
        values=held.values.read(at, 0, positions.shape[2], positions),
        positions=positions,
        geometry=plan.geometry,
        scaling=scaling,
        layer=layer,
        sinks=protected[0],
        recent=protected[1],
        queries=queries,
        query_positions=query_positions,
        attention=None if attention is None else attention.transpose(-1, -2),
        log_votes=votes,
        slot_state=columns,
        row_state={name: values[list(rows)] for name, values in row_state.items()},
        rotary=plan.rotary,
        in_order=in_order,
        pinned=spans.pinned(positions, rows),
        regions=spans.of(positions, rows),
    )


def lay_down(
    plan: Plan, held: Holdings, rows: Sequence[int], result: Compressed, limit: int, *, fills: bool = False
) -> None:
    """Replace the contents of the rows by what a compression left of them; `fills` as in `Move`."""
    held.slots.write(rows, result.observed)
    move = Move(rows, result.kept, fills, result.lengths)
    layout = layout_after(plan, held, move, limit)
    if result.entries is None:
        held.evict(move, layout)
    else:
        held.replace(move, result.entries, result.slot_state, layout)


def drop_pads(plan: Plan, held: Holdings, limit: int) -> None:
    """Close the gaps that pads have left in every row."""
    rows = range(held.slots.layout.rows)
    move = Move(rows, indices_of(held.slots.padded(POSITIONS, rows) >= 0))
    held.keep(move, layout_after(plan, held, move, limit))


def put_in_order(held: Holdings) -> None:
    """Let the entries of every segment stand in ascending order of position; none may be packed."""
    rows = range(held.slots.layout.rows)
    slots = by_position(held.slots.padded(POSITIONS, rows))
    for store in (held.keys.tail, held.values.tail, held.slots):
        store.write(rows, {name: take(store.padded(name, rows), slots) for name in store.columns})


def layout_after(plan: Plan, held: Holdings, move: Move, limit: int) -> Layout:
    """How all segments of a layer are laid out once some rows have been reduced."""
    lengths = list(held.slots.lengths)
    for row, counts in zip(move.rows, move.lengths, strict=True):
        lengths[row] = counts
    longest = max(max(row) for row in lengths)
    slack = min(plan.budgets.slack, max(longest, _ROOM))  # storage follows the tokens, whatever `every` says
    if plan.ragged:
        return Layout(tuple(_with_room(row, slack, limit) for row in lengths))
    return Layout.even(len(lengths), len(lengths[0]), max(longest, min(longest + slack, limit)))


def _with_room(lengths: Sequence[int], slack: int, limit: int) -> tuple[int, ...]:
    """Capacities of a row whose heads differ; one that has not been compressed just now has used some of its slack."""
    room = min(slack, max(0, limit * len(lengths) - sum(lengths)) // len(lengths))
    return tuple(length + room for length in lengths)
