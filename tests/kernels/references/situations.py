"""Entries, the queries that vote on them, and the same as views: what score kernels and scorers are both given."""

from typing import Any

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Geometry, View
from kvpolicy_kernels.score.window_queries import WindowQueries
from tests.kernels.scenes import DEVICE, Scene, label, scene


@attrs.frozen(eq=False)
class Situation:
    """A scene with a window of queries [B, H, W, D] and their positions [B, W], one of each a layer."""

    scene: Scene
    queries: list[Tensor]
    query_positions: list[Tensor]
    group: int
    scaling: float
    protect: dict[str, Any]  # sinks, recent; and pinned [P, T] bool, where slots have a label

    @property
    def window(self) -> WindowQueries:
        """The queries as kernels are given them."""
        return WindowQueries.of(self.queries, self.query_positions, self.scene.segments, self.scaling)

    def padded(self, name: str) -> Tensor:
        """A column as [L, B, K, T, ...]; zeros (positions: -1) in slots that hold nothing."""
        segments, lists = self.scene.segments, self.scene.lists(name)
        shape = (segments.count, segments.longest, *lists[0].shape[1:])
        filled = torch.full(shape, -1 if name == "positions" else 0, dtype=lists[0].dtype, device=DEVICE)
        for row, entries in zip(filled, lists, strict=True):
            row[: len(entries)] = entries
        return filled.view(segments.layers, segments.rows, segments.heads, *shape[1:])

    def views(self, dtype: torch.dtype) -> list[View]:
        """One view a layer, on the CPU, everything as `dtype`."""
        segments, columns = self.scene.segments, {name: self.padded(name).cpu() for name in self.scene.columns}
        columns = {name: one.to(dtype) if one.is_floating_point() else one for name, one in columns.items()}
        dim = columns["keys"].shape[-1]
        geometry = Geometry((0,), segments.heads * self.group, segments.heads, dim)
        pinned = self.protect.get("pinned")
        if pinned is not None:
            pinned = pinned.cpu().view(segments.layers, segments.rows, segments.heads, -1)
        return [
            View(
                keys=columns["keys"][layer],
                values=columns["values"][layer],
                positions=columns["positions"][layer].long(),
                geometry=geometry,
                scaling=self.scaling,
                queries=self.queries[layer].cpu().to(dtype),
                query_positions=self.query_positions[layer].long().cpu(),
                attention=columns["attention"][layer].transpose(-1, -2) if "attention" in columns else None,
                log_votes=columns["log_votes"][layer] if "log_votes" in columns else None,
                sinks=self.protect["sinks"],
                recent=self.protect["recent"],
                pinned=None if pinned is None else pinned[layer],
            )
            for layer in range(segments.layers)
        ]


def situation(
    lengths: list[list[list[int]]],
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    *,
    group: int = 2,
    width: int = 4,
    votes: bool = False,
    sinks: int = 2,
    recent: int = 3,
    capacity: int | None = None,
    pinned: str | None = None,
    seed: int = 0,
) -> Situation:
    """Random entries in heads of these lengths [L, B, K]; some rows have had fewer than `width` queries.

    `pinned` is the kind of label that slots have, if any.
    """
    extra = {"attention": ((group,), torch.float32)} | ({"log_votes": ((), torch.float32)} if votes else {})
    made = scene(torch.tensor(lengths), dim, dtype, capacity=capacity, extra=extra, seed=seed)
    for storage in made.columns["attention"].storages:
        storage.abs_()
    segments, random = made.segments, torch.Generator().manual_seed(seed + 1)
    queries, places = [], []
    for layer in range(segments.layers):
        shape = (segments.rows, segments.heads * group, width, dim)
        queries.append((2 * torch.randn(shape, generator=random)).to(dtype).to(DEVICE))
        newest = torch.tensor([_newest(made, layer, row) for row in range(segments.rows)])
        back = torch.randint(0, 9, (segments.rows, width), generator=random).cumsum(1).flip(1)
        places.append((newest[:, None] + 3 - back).clamp(min=-1).to(DEVICE))
    protect: dict[str, Any] = {"sinks": sinks, "recent": recent}
    if pinned is not None:
        protect["pinned"] = label(pinned, segments, seed)
    return Situation(made, queries, places, group, dim**-0.5, protect)


def _newest(made: Scene, layer: int, row: int) -> int:
    first = layer * made.segments.per_layer + row * made.segments.heads
    heads = made.lists("positions")[first : first + made.segments.heads]
    return max([int(one.max()) for one in heads if len(one)], default=-1)
