"""Builds the view of a layer from its storage, and writes what a compression left of it back."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from kvpolicy.cache.compaction.compaction_plan import CompactionPlan, filling_together
from kvpolicy.cache.request.request_spans import RequestSpans
from kvpolicy.cache.storage.layer_storage import LayerStorage
from kvpolicy.cache.storage.layout import PerSegment
from kvpolicy.cache.storage.segment_index import RowSegments
from kvpolicy.errors import CacheError
from kvpolicy.plan.compress.step import Compressed
from kvpolicy.plan.forward_observers import ATTENTION
from kvpolicy.plan.plan import LOG_VOTES, POSITIONS, Plan
from kvpolicy.stages import View


def build_view(
    plan: Plan,
    storage: LayerStorage,
    window: tuple[Tensor, Tensor] | tuple[None, None],
    rows: Sequence[int],
    *,
    layer: int,
    protected: tuple[int, int],
    scaling: float,
    row_state: Mapping[str, Tensor],
    in_order: bool,
    spans: RequestSpans,
    output_projection: Callable[[], Tensor] | None = None,
) -> View:
    """What a plugin sees of some rows of a layer, copied only where segments differ; the rows must hold no pads.

    `window` are the newest queries of the rows and their positions; `protected` are the sinks and the recent entries of
    each of the rows; `output_projection` gives the weight [H, Dv, C] that follows the attention of the layer.

    What is packed is unpacked here: this one layer exists in full precision while it is compressed.
    """
    at = RowSegments(rows)
    columns = {name: storage.column(name, at) for name in plan.columns}
    positions = columns.pop(POSITIONS)
    attention, votes = columns.pop(ATTENTION, None), columns.pop(LOG_VOTES, None)
    return View(
        keys=storage.keys.read(at, 0, positions.shape[2], positions),
        values=storage.values.read(at, 0, positions.shape[2], positions),
        positions=positions,
        geometry=plan.geometry,
        scaling=scaling,
        layer=layer,
        sinks=protected[0],
        recent=protected[1],
        queries=window[0],
        query_positions=window[1],
        attention=None if attention is None else attention.transpose(-1, -2),
        log_votes=votes,
        slot_state=columns,
        row_state={name: values[list(rows)] for name, values in row_state.items()},
        rotary=plan.rotary,
        output_projection=projection_of(output_projection) if plan.needs.output_projection else None,
        calibration=plan.calibrations[layer],
        in_order=in_order,
        pinned=spans.pinned(positions, rows),
        regions=spans.of(positions, rows),
        region_spans=spans.starts(rows, positions.device),
        region_names=() if spans.regions is None else spans.regions.names,
    )


def projection_of(read: Callable[[], Tensor] | None) -> Tensor:
    """The output projection that a layer's call gives. Raises CacheError for None: the cache has no attachment yet."""
    if read is None:
        raise CacheError(
            "the cache belongs to no attachment yet, so the output projection is not known: use it there first"
        )
    return read()


def most_evicted(before: Sequence[Sequence[int]], after: PerSegment) -> int:
    """The most entries that a head loses; both are lengths [rows][K]."""
    pairs = (pair for rows in zip(before, after, strict=True) for pair in zip(*rows, strict=True))
    return max((held - stays for held, stays in pairs), default=0)


def _holes(storage: LayerStorage, rows: Sequence[int], result: Compressed) -> int:
    """No head of the rows has more holes than that."""
    if result.evicted is not None:
        return result.evicted
    return most_evicted([storage.lengths[row] for row in rows], result.lengths)


def fillings(
    storages: Sequence[LayerStorage], rows: Sequence[int], results: Sequence[Compressed]
) -> Sequence[Tensor | None]:
    """For `write_back` with `fills` of several layers: which holes are filled with what, computed for all at once."""
    most = max(_holes(storage, rows, result) for storage, result in zip(storages, results, strict=True))
    return filling_together([result.kept for result in results], most)


def write_back(
    storage: LayerStorage,
    rows: Sequence[int],
    result: Compressed,
    limit: int,
    *,
    fills: bool = False,
    filling: Tensor | None = None,
) -> None:
    """Replace the contents of the rows by what a compression left of them.

    With `fills`, the last of the entries that stay fill the holes that the others leave, if storage stays; `filling`
    says which, where that is known.
    """
    for name, values in result.observed.items():
        storage.write_column(name, RowSegments(rows), values)
    holes = _holes(storage, rows, result) if fills else None
    compaction = CompactionPlan(rows, result.kept, holes, filling, result.lengths, result.finite)
    if result.entries is None:
        storage.evict(compaction, limit)
    else:
        storage.replace(compaction, result.entries, result.slot_state, limit)
