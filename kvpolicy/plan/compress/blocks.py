"""Layers that hold little, shown to plugins as the rows of one view: one call for all of them, not one for each.

Where a layer holds little, a compression is as long as its operators are many, and not as its tensors are large.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import attrs
import torch
from torch import Tensor

from kvpolicy.spec.policy import PolicySpec
from kvpolicy.stages import View

_NUMBERS = 2**20  # of the keys of a block: copies of more would not stay in a CPU's cache
_OF_LAYER = 2**17  # of the keys of a layer: to copy more takes as long as calls of its own
_COLUMNS = (
    *("keys", "values", "positions", "queries", "query_positions", "attention", "log_votes", "pinned", "regions"),
    "region_spans",
)
_columns, _told = attrgetter(*_COLUMNS), attrgetter("scaling", "sinks", "recent", "in_order")


@attrs.frozen(eq=False)
class Block:
    """Layers of the same B rows as one view [layers · B, ...], the rows of a layer beside each other; or one layer."""

    view: View
    layers: int = 1

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """What a plugin gave of the view, [layers · B, ...], as one [B, ...] for each layer."""
        return (tensor,) if self.layers == 1 else self.by_layer(tensor).unbind(0)

    def by_layer(self, tensor: Tensor) -> Tensor:
        """[layers · B, ...] as [layers, B, ...]."""
        return tensor.view(self.layers, -1, *tensor.shape[1:])

    def mapped(self, change: Callable[[View], View]) -> "Block":
        """The same layers, seen otherwise."""
        return Block(change(self.view), self.layers)


def blocks_of(spec: PolicySpec, views: Sequence[View]) -> tuple[Block, ...]:
    """Blocks of as many views as are small together, if plugins cannot tell them from one; else one of each."""
    numbers = max(1, views[0].keys.numel())
    count = _NUMBERS // numbers
    if count < 2 or numbers > _OF_LAYER or len(views) == 1 or not layers_as_rows(spec) or not _alike(views):
        return tuple(map(Block, views))
    return tuple(_block(views[first : first + count]) for first in range(0, len(views), count))


def _block(views: Sequence[View]) -> Block:
    columns: dict[str, Any] = dict(zip(_COLUMNS, map(_joined, zip(*map(_columns, views), strict=True)), strict=True))
    slots, rows = (
        {name: torch.cat([own[name] for own in states]) for name in states[0]}
        for states in ([view.slot_state for view in views], [view.row_state for view in views])
    )
    columns |= {"slot_state": slots, "row_state": rows, "calibration": {}, "output_projection": None}
    return Block(attrs.evolve(views[0], **columns), len(views))


def layers_as_rows(spec: PolicySpec) -> bool:
    """Whether all plugins that are shown views look at nothing that a layer has to itself."""
    return all(plugin.layers_as_rows for plugin in (*(one.scorer for one in spec.score), spec.select, spec.merge))


def _alike(views: Sequence[View]) -> bool:
    """Whether layers can be rows of one view."""
    first, shapes = _told(views[0]), _shapes(views[0])
    return all(_told(view) == first and _shapes(view) == shapes for view in views[1:])


def _shapes(view: View) -> list[torch.Size | None]:
    return [None if column is None else column.shape for column in _columns(view)]


def _joined(columns: Sequence[Tensor | None]) -> Tensor | None:
    there = [column for column in columns if column is not None]
    return torch.cat(there) if there else None
