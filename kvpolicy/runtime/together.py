"""Compaction in kernels: all layers of a step in one launch where storages stay, and else a launch a layer."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvpolicy.plan.compress.kernel_errors import kernel_errors
from kvpolicy.plan.compress.step import Compressed
from kvpolicy.plan.plan import POSITIONS, Plan
from kvpolicy.runtime.compaction import layout_after
from kvpolicy.runtime.copying import Move
from kvpolicy.runtime.holdings import Holdings
from kvpolicy.runtime.layout import Layout
from kvpolicy.runtime.store import Store
from kvpolicy_kernels import Column, Segments


class Holder(Protocol):
    """A layer, as far as its entries go."""

    @property
    def held(self) -> Holdings:
        """Its entries."""

    @property
    def limit(self) -> int:
        """Slots per KV head beyond which its storage does not grow."""


def compact_layers(
    plan: Plan, layers: Sequence[Holder], rows: Sequence[int], results: Sequence[Compressed], *, fills: bool
) -> list[bool]:
    """Reduce some rows of the layers to what a compression keeps; says of each layer whether that was done.

    It is not where entries were changed or are packed, and nothing is done then. `fills` as in `Move`.
    """
    if plan.packs or any(result.entries is not None for result in results):
        return [False] * len(layers)  # packed entries and pages do not stand where their slots do
    moves = []
    for layer, result in zip(layers, results, strict=True):
        layer.held.slots.write(rows, result.observed)
        moves.append(_of_all_rows(layer.held, rows, result, fills=fills))
    pairs = list(zip(layers, moves, strict=True))
    layouts = [layout_after(plan, layer.held, move, layer.limit) for layer, move in pairs]
    stay = [layout == layer.held.slots.layout for layout, layer in zip(layouts, layers, strict=True)]
    if all(stay):
        return [_within(layers, moves)] * len(layers)
    each = zip(pairs, layouts, stay, strict=True)
    return [_within([layer], [move]) if stays else _into(layout, layer, move) for (layer, move), layout, stays in each]


def _of_all_rows(held: Holdings, rows: Sequence[int], result: Compressed, *, fills: bool) -> Move:
    """The move that keeps of some rows what is said, and everything of the others."""
    layout, longest, kept = held.slots.layout, held.slots.longest, result.kept
    if len(rows) == layout.rows:
        return Move(rows, kept, fills, result.lengths)
    slots = torch.arange(longest, device=kept.device)
    lengths = held.slots.lengths_on_device.view(layout.rows, layout.heads, 1)
    everything = slots.where(slots < lengths, -1)
    everything[list(rows)] = torch.nn.functional.pad(kept, (0, longest - kept.shape[-1]), value=-1)
    after = list(held.slots.lengths)
    for row, counts in zip(rows, result.lengths, strict=True):
        after[row] = counts
    return Move(range(layout.rows), everything, fills, tuple(after))


def _within(layers: Sequence[Holder], moves: Sequence[Move]) -> bool:
    """Move entries within their storages, all layers in one launch; False when kernels cannot."""
    from kvpolicy_kernels.compact.compact import compact

    held = [layer.held for layer in layers]
    ordered = not moves[0].fills
    try:
        columns = _columns(held)
        positions = columns.pop(POSITIONS)
        compact(_segments(held), _kept(moves), list(columns.values()), ordered=ordered, positions=positions)
    except kernel_errors():
        return False
    for one, move in zip(held, moves, strict=True):
        for store in _stores(one):
            store.adopt(store.tensors, store.layout, move.lengths)
    return True


def _into(layout: Layout, layer: Holder, move: Move) -> bool:
    """Copy the entries of a layer into storages of another size, or of heads of other sizes, in one launch."""
    from kvpolicy_kernels.compact.compact import compact_to

    held = layer.held
    stores, segments = list(_stores(held)), _segments([held])
    fresh = [store.allocate(layout) for store in stores]
    tensors = {name: tensor for columns in fresh for name, tensor in columns.items()}
    starts = layout.offsets_on(segments.starts.device).flatten()
    after = Segments(starts, segments.lengths, 1, layout.rows, layout.heads, segments.longest)
    try:
        targets = [_column([tensors[name]]) for name in _names(held)]
        compact_to(segments, _kept([move]), list(_columns([held]).values()), after, targets)
    except kernel_errors():
        return False
    for store, columns in zip(stores, fresh, strict=True):
        store.adopt(columns, layout, move.lengths)
    return True


def _segments(held: Sequence[Holdings]) -> Segments:
    stores = [one.slots for one in held]
    return Segments(
        starts=torch.cat([store.starts for store in stores]),
        lengths=torch.cat([store.lengths_on_device for store in stores]),
        layers=len(stores),
        rows=stores[0].layout.rows,
        heads=stores[0].layout.heads,
        longest=max(store.longest for store in stores),
    )


def _kept(moves: Sequence[Move]) -> Tensor:
    """[P, N] int32, N the largest number that any head of any layer keeps."""
    width = max(move.kept.shape[-1] for move in moves)
    kept = [torch.nn.functional.pad(move.kept, (0, width - move.kept.shape[-1]), value=-1) for move in moves]
    return torch.cat(kept).flatten(0, 1).int()


def _columns(held: Sequence[Holdings]) -> dict[str, Column]:
    return {name: _column([_tensor(one, name) for one in held]) for name in _names(held[0])}


def _stores(held: Holdings) -> Iterator[Store]:
    yield from (held.keys.tail, held.values.tail, held.slots)


def _names(held: Holdings) -> list[str]:
    return [name for store in _stores(held) for name in store.columns]


def _tensor(held: Holdings, name: str) -> Tensor:
    return next(store.tensors[name] for store in _stores(held) if name in store.columns)


def _column(storages: Sequence[Tensor]) -> Column:
    """Flat storages [slots, ...], one a layer."""
    return Column.of([storage[None, None] for storage in storages])
