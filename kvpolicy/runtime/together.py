"""Compaction of all layers of a step in one launch, where entries close up within their storages."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvpolicy.plan.pipeline import Compressed
from kvpolicy.plan.plan import POSITIONS, Plan
from kvpolicy.plan.refusals import refusals
from kvpolicy.runtime.compaction import layout_after
from kvpolicy.runtime.copying import Move
from kvpolicy.runtime.holdings import Holdings
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


def close_up(
    plan: Plan, layers: Sequence[Holder], rows: Sequence[int], results: Sequence[Compressed], *, fills: bool
) -> bool:
    """Reduce all rows of the layers to what a compression keeps; False, and nothing done, where that takes more.

    It takes more when rows are left out, entries were changed or are packed, or storage grows or shrinks. `fills` as
    in `Move`.
    """
    if plan.packs or any(result.entries is not None for result in results):
        return False  # packed entries and pages do not stand where their slots do
    moves = [Move(rows, result.kept, fills) for result in results]
    for layer, move in zip(layers, moves, strict=True):
        layout = layer.held.slots.layout
        if len(rows) < layout.rows or layout_after(plan, layer.held, move, layer.limit) != layout:
            return False
    for layer, result in zip(layers, results, strict=True):
        layer.held.slots.write(rows, result.observed)
    try:
        _compact(layers, moves)
    except refusals():
        return False
    for layer, move in zip(layers, moves, strict=True):
        for store in _stores(layer.held):
            store.adopt(store.tensors, store.layout, move.lengths)
    return True


def _compact(layers: Sequence[Holder], moves: Sequence[Move]) -> None:
    from kvpolicy_kernels.compact import compact

    stores = [layer.held.slots for layer in layers]
    width = max(move.kept.shape[-1] for move in moves)
    kept = [torch.nn.functional.pad(move.kept, (0, width - move.kept.shape[-1]), value=-1) for move in moves]
    segments = Segments(
        starts=torch.cat([store.starts for store in stores]),
        lengths=torch.cat([store.lengths_on_device for store in stores]),
        layers=len(layers),
        rows=stores[0].layout.rows,
        heads=stores[0].layout.heads,
        longest=max(store.longest for store in stores),
    )
    columns = {name: _column([_tensor(layer.held, name) for layer in layers]) for name in _names(layers[0].held)}
    positions, ordered = columns.pop(POSITIONS), not moves[0].fills
    compact(segments, torch.cat(kept).flatten(0, 1).int(), list(columns.values()), ordered=ordered, positions=positions)


def _stores(held: Holdings) -> Iterator[Store]:
    yield from (held.keys.tail, held.values.tail, held.slots)


def _names(held: Holdings) -> list[str]:
    return [name for store in _stores(held) for name in store.columns]


def _tensor(held: Holdings, name: str) -> Tensor:
    return next(store.tensors[name] for store in _stores(held) if name in store.columns)


def _column(storages: Sequence[Tensor]) -> Column:
    """Flat storages [slots, ...], one a layer."""
    return Column.of([storage[None, None] for storage in storages])
