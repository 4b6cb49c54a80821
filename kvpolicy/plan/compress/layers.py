"""The views of layers that are compressed together, and where kernels find their entries."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import View
from kvpolicy_kernels import Column, Segments
from kvpolicy_kernels.common.segments import pitch
from kvpolicy_kernels.common.support import require

if TYPE_CHECKING:
    from kvpolicy_kernels.score.window_queries import WindowQueries


@attrs.frozen(eq=False)
class Layers:
    """L views of the same B rows and K heads; P = L·B·K segments, those of a layer after those of another."""

    views: tuple[View, ...]
    segments: Segments
    columns: Mapping[str, Column]  # keys, values, positions; log_votes and attention [slots, G] where views have them

    @classmethod
    def of(cls, views: Sequence[View]) -> "Layers":
        """Raises UnsupportedInputError for entries that kernels cannot address, or that stand out of order."""
        require(all(view.in_order for view in views), "entries are not in ascending order of position")
        tensors = [_side_by_side(view) for view in views]
        lengths = torch.stack([view.lengths for view in views])
        columns = {name: Column.of([own[name] for own in tensors]) for name in tensors[0]}
        return cls(tuple(views), Segments.of([own["keys"] for own in tensors], lengths), columns)

    @property
    def protect(self) -> dict[str, Any]:
        """What is protected, as launchers are told."""
        return {"sinks": self.views[0].sinks, "recent": self.views[0].recent, "pinned": self.pinned}

    @cached_property
    def pinned(self) -> Tensor | None:
        """[P, T] bool: entries protected beside sinks and recent ones; None where no view has such."""
        pinned = [view.pinned for view in self.views]
        if all(label is None for label in pinned):
            return None
        if len(pinned) == 1 and pinned[0] is not None:
            return pinned[0].flatten(0, 1).contiguous()
        out = torch.zeros(self.segments.count, self.segments.longest, dtype=torch.bool, device=self._device)
        for rows, label in zip(self.per_view(out), pinned, strict=True):
            if label is not None:
                rows.copy_(label)
        return out

    @cached_property
    def protected(self) -> Tensor:
        """Protected entries of each head, int64 [L·B, K]; none is counted twice."""
        first = [view.positions[..., : view.sinks] for view in self.views]
        sinks = torch.cat(
            [
                ((positions >= 0) & (positions < view.sinks)).sum(-1)
                for positions, view in zip(first, self.views, strict=True)
            ]
        )
        held, recent = self._held, self.views[0].recent
        ends = held.minimum(sinks + recent)  # positions ascend: sinks come first, and recent entries last
        if self.pinned is None:
            return ends
        slots = torch.arange(self.segments.longest, device=self._device)
        between = (slots >= sinks[..., None]) & (slots < held[..., None] - recent)
        return ends + (self.pinned.view(between.shape) & between).sum(-1)

    @cached_property
    def room(self) -> Tensor:
        """Candidates of each head, int64 [L·B, K]."""
        return self._held - self.protected

    @property
    def _held(self) -> Tensor:
        """Entries of each head, int64 [L·B, K]."""
        return self.segments.lengths.view(-1, self.segments.heads).long()

    @property
    def _device(self) -> torch.device:
        return self.segments.starts.device

    def window(self) -> "WindowQueries":
        """The queries that vote, packed for the kernels."""
        from kvpolicy_kernels.score.window_queries import WindowQueries

        queries = [view.window for view in self.views]
        positions = [view.window_positions for view in self.views]
        return WindowQueries.of(queries, positions, self.segments, self.views[0].scaling)

    def empty(self, count: int) -> Tensor:
        """[count, P, T] float32, not filled."""
        shape = (count, self.segments.count, self.segments.longest)
        return torch.empty(shape, dtype=torch.float32, device=self._device)

    def counted(self, numbers: Tensor) -> Tensor:
        """One number for each segment as [L, B, K]."""
        return numbers.view(self.segments.layers, self.segments.rows, self.segments.heads)

    def per_layer(self, flat: Tensor) -> list[Tensor]:
        """[P, N] as one [B, K, N] a layer."""
        segments = self.segments
        return list(flat.view(segments.layers, segments.rows, segments.heads, flat.shape[1]))

    def per_view(self, flat: Tensor) -> list[Tensor]:
        """[P, T] as one [B, K, T] a layer, T that of its view."""
        layers = zip(self.per_layer(flat), self.views, strict=True)
        return [layer[..., : view.positions.shape[2]] for layer, view in layers]


def _side_by_side(view: View) -> dict[str, Tensor]:
    """The columns of a view [B, K, T, ...], all with the same distance between segments: then one start serves all."""
    held = {"keys": view.keys, "values": view.values, "positions": view.positions.to(torch.int32)}
    if view.log_votes is not None:
        held["log_votes"] = view.log_votes
    if view.attention is not None:
        held["attention"] = view.attention.transpose(-1, -2)
    if len({pitch(tensor) for tensor in held.values()}) == 1:
        return held
    return {name: tensor.contiguous() for name, tensor in held.items()}
