"""Builds the view of a layer from its storage, and writes what a compression left of it back."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from kvpolicy.cache.compaction.compaction_plan import CompactionPlan
from kvpolicy.cache.observation_window import ObservationWindow
from kvpolicy.cache.request_spans import RequestSpans
from kvpolicy.cache.storage.layer_storage import LayerStorage
from kvpolicy.cache.storage.layout import Layout
from kvpolicy.cache.storage.segment_index import RowSegments
from kvpolicy.plan.compress.step import Compressed
from kvpolicy.plan.forward_observers import ATTENTION
from kvpolicy.plan.plan import LOG_VOTES, POSITIONS, Plan
from kvpolicy.stages import View
from kvpolicy.stages.slots import by_position, indices_of, take

_ROOM = 1024  # slots that a compression may leave room for, however few entries stay


def build_view(
    plan: Plan,
    storage: LayerStorage,
    window: ObservationWindow,
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
    at = RowSegments(rows)
    columns = {name: storage.slots.padded(name, rows) for name in plan.columns}
    positions = columns.pop(POSITIONS)
    attention, votes = columns.pop(ATTENTION, None), columns.pop(LOG_VOTES, None)
    queries, query_positions = window.last(rows)
    return View(
        keys=storage.keys.read(at, 0, positions.shape[2], positions),
        values=storage.values.read(at, 0, positions.shape[2], positions),
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


def write_back(
    plan: Plan, storage: LayerStorage, rows: Sequence[int], result: Compressed, limit: int, *, fills: bool = False
) -> None:
    """Replace the contents of the rows by what a compression left of them; `fills` as in `CompactionPlan`."""
    storage.slots.write(rows, result.observed)
    move = CompactionPlan(rows, result.kept, fills, result.lengths)
    layout = layout_after(plan, storage, move, limit)
    if result.entries is None:
        storage.evict(move, layout)
    else:
        storage.replace(move, result.entries, result.slot_state, layout)


def drop_pads(plan: Plan, storage: LayerStorage, limit: int) -> None:
    """Close the gaps that pads have left in every row."""
    rows = range(storage.slots.layout.rows)
    move = CompactionPlan(rows, indices_of(storage.slots.padded(POSITIONS, rows) >= 0))
    storage.keep(move, layout_after(plan, storage, move, limit))


def sort_by_position(storage: LayerStorage) -> None:
    """Let the entries of every segment stand in ascending order of position; none may be packed."""
    rows = range(storage.slots.layout.rows)
    slots = by_position(storage.slots.padded(POSITIONS, rows))
    for store in (storage.keys.residual, storage.values.residual, storage.slots):
        store.write(rows, {name: take(store.padded(name, rows), slots) for name in store.columns})


def layout_after(plan: Plan, storage: LayerStorage, move: CompactionPlan, limit: int) -> Layout:
    """How all segments of a layer are laid out once some rows have been reduced."""
    lengths = list(storage.slots.lengths)
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
