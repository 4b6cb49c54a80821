"""Compaction in kernels: all layers of a step in one launch where storages stay, and else a launch a layer."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvpolicy.cache.compaction.compaction_plan import CompactionPlan
from kvpolicy.cache.compaction.write_back import most_evicted
from kvpolicy.cache.storage.layout import Layout
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.plan.compress.kernel_errors import kernel_errors
from kvpolicy.plan.compress.step import Compressed
from kvpolicy.plan.plan import POSITIONS
from kvpolicy_kernels import Column, Segments


def compact_layers(
    storages: Sequence[SegmentedStorage],
    limits: Sequence[int],
    rows: Sequence[int],
    results: Sequence[Compressed],
    *,
    fills: bool,
) -> list[bool]:
    """Reduce some rows of the layers to what a compression keeps; says of each layer whether that was done.

    It is not where entries were changed or are packed, and nothing is done then: packed entries and pages do not stand
    where their slots do. `limits` are the slots per KV head beyond which a layer's storage does not grow; `fills` as in
    `write_back`.
    """
    if any(storage.packs for storage in storages) or any(result.entries is not None for result in results):
        return [False] * len(storages)
    compactions = []
    for storage, result in zip(storages, results, strict=True):
        storage.slots.write(rows, result.observed)
        compactions.append(_of_all_rows(storage, rows, result, fills=fills))
    jobs = list(zip(storages, compactions, strict=True))
    layouts = [
        storage.layout_after(compaction, limit) for (storage, compaction), limit in zip(jobs, limits, strict=True)
    ]
    stay = [layout == storage.slots.layout for layout, storage in zip(layouts, storages, strict=True)]
    if all(stay):
        return [_compact_in_place(storages, compactions)] * len(storages)
    return [
        _compact_in_place([storage], [compaction]) if stays else _compact_into(layout, storage, compaction)
        for (storage, compaction), layout, stays in zip(jobs, layouts, stay, strict=True)
    ]


def _of_all_rows(storage: SegmentedStorage, rows: Sequence[int], result: Compressed, *, fills: bool) -> CompactionPlan:
    """A compaction that keeps of some rows what is said, and everything of the others."""
    kept = result.kept
    holes = most_evicted([storage.lengths[row] for row in rows], result.lengths) if fills else None
    if len(rows) == storage.rows:
        return CompactionPlan(rows, kept, holes, known_lengths=result.lengths)
    slots = torch.arange(storage.longest, device=kept.device)
    lengths = storage.slots.lengths_on_device.view(storage.rows, storage.heads, 1)
    everything = slots.where(slots < lengths, -1)
    everything[list(rows)] = pad(kept, (0, storage.longest - kept.shape[-1]), value=-1)
    after = list(storage.lengths)
    for row, counts in zip(rows, result.lengths, strict=True):
        after[row] = counts
    return CompactionPlan(range(storage.rows), everything, holes, known_lengths=tuple(after))


def _compact_in_place(storages: Sequence[SegmentedStorage], compactions: Sequence[CompactionPlan]) -> bool:
    """Move entries within their storages, all layers in one launch; False when kernels cannot."""
    try:
        move_in_kernel(
            storages, [compaction.kept for compaction in compactions], ordered=compactions[0].most_holes is None
        )
    except kernel_errors():
        return False
    for storage, compaction in zip(storages, compactions, strict=True):
        for store in storage.plain_stores:
            store.adopt(store.tensors, store.layout, compaction.lengths)
    return True


def move_in_kernel(storages: Sequence[SegmentedStorage], kept: Sequence[Tensor], *, ordered: bool) -> Tensor:
    """Move the slots [B, K, N] that each layer keeps to the front of their segments, on the device alone.

    Gives the lengths, int32 [L·B·K]; the storages are not told. `ordered` as in the kernel. Raises what
    `kernel_errors` names, when nothing was moved.
    """
    from kvpolicy_kernels.compact.compact import compact

    columns = _columns(storages)
    positions = columns.pop(POSITIONS)
    return compact(_segments(storages), _padded(kept), list(columns.values()), ordered=ordered, positions=positions)


def _compact_into(layout: Layout, storage: SegmentedStorage, compaction: CompactionPlan) -> bool:
    """Copy the entries of a layer into tensors of another size, or of heads of other sizes, in one launch."""
    from kvpolicy_kernels.compact.compact import compact_to

    stores, segments = storage.plain_stores, _segments([storage])
    fresh = [store.allocate(layout) for store in stores]
    tensors = {name: tensor for columns in fresh for name, tensor in columns.items()}
    starts = layout.offsets_on(segments.starts.device).flatten()
    after = Segments(starts, segments.lengths, 1, layout.rows, layout.heads, segments.longest)
    try:
        columns = _columns([storage])
        targets = [_column([tensors[name]]) for name in columns]
        compact_to(segments, _padded([compaction.kept]), list(columns.values()), after, targets)
    except kernel_errors():
        return False
    for store, columns_after in zip(stores, fresh, strict=True):
        store.adopt(columns_after, layout, compaction.lengths)
    return True


def _segments(storages: Sequence[SegmentedStorage]) -> Segments:
    stores = [storage.slots for storage in storages]
    return Segments(
        starts=torch.cat([store.starts for store in stores]),
        lengths=torch.cat([store.lengths_on_device for store in stores]),
        layers=len(stores),
        rows=stores[0].layout.rows,
        heads=stores[0].layout.heads,
        longest=max(store.longest for store in stores),
    )


def _padded(kept: Sequence[Tensor]) -> Tensor:
    """[P, N] int32, N the largest number that any head of any layer keeps."""
    width = max(slots.shape[-1] for slots in kept)
    return torch.cat([pad(slots, (0, width - slots.shape[-1]), value=-1) for slots in kept]).flatten(0, 1).int()


def _columns(storages: Sequence[SegmentedStorage]) -> dict[str, Column]:
    """Every column of the slots, keys and values among them, over all layers."""
    tensors = [
        {name: tensor for store in storage.plain_stores for name, tensor in store.tensors.items()}
        for storage in storages
    ]
    return {name: _column([columns[name] for columns in tensors]) for name in tensors[0]}


def _column(flat: Sequence[Tensor]) -> Column:
    """Flat tensors [slots, ...], one a layer."""
    return Column.of([tensor[None, None] for tensor in flat])
