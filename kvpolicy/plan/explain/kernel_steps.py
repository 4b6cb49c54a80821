"""The bytes that kernels address in one compression of one layer and sequence, launch by launch.

They are what the launchers say of themselves; a test counts them in the interpreter.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import attrs
import torch

from kvpolicy.plan.compress.fusion import Term
from kvpolicy.plan.explain.steps import Shapes, Step, name_of
from kvpolicy.plan.forward_observers import ATTENTION
from kvpolicy.plan.plan import LOG_VOTES, POSITIONS, Plan
from kvpolicy_kernels import Column, Segments, Tile, Traffic
from kvpolicy_kernels.score.tile import ColumnRequest

_READ_BY_SCORES = ("keys", "values", POSITIONS, ATTENTION, LOG_VOTES)


@attrs.frozen(eq=False)
class KernelSteps:
    """Steps of a plan that run in kernels, on tensors without data: K heads that hold T entries each."""

    plan: Plan
    shapes: Shapes
    segments: Segments
    columns: dict[str, Column]

    @classmethod
    def of(cls, plan: Plan, shapes: Shapes) -> "KernelSteps":
        """With the columns of the plan."""
        geometry, heads = plan.geometry, plan.geometry.kv_heads
        starts = torch.empty(heads, dtype=torch.int64, device="meta")
        segments = Segments(starts, starts.to(torch.int32), 1, 1, heads, shapes.held)
        kinds = {name: (column.dtype, prod(column.shape)) for name, column in plan.columns.items()}
        kinds |= dict.fromkeys(("keys", "values"), (plan.dtype, geometry.head_dim))
        columns = {name: Column(starts[:1], dtype, width, ()) for name, (dtype, width) in kinds.items()}
        return cls(plan, shapes, segments, columns)

    @property
    def _lengths(self) -> tuple[int, ...]:
        return (self.shapes.held,) * self.plan.geometry.kv_heads

    @property
    def _protected(self) -> dict[str, Any]:
        sinks, recent = self.shapes.protected
        return {"recent": recent, "positions": self.columns[POSITIONS] if sinks else None, "pinned": self._pinned}

    @property
    def _pinned(self) -> bool:
        """Whether kernels read a label of every slot: it is protected by its place in the request."""
        return self.plan.spec.protect.by_place

    def score(self, terms: Sequence[Term]) -> Iterator[Step]:
        """Columns that scorers compute beforehand, then all tile functions, the statistics before them included."""
        tiles = [term.tile for term in terms if term.tile is not None]
        if not tiles:
            return
        for term in terms:
            if term.tile is not None and term.tile.column is not None:
                yield self._column(f"{name_of(term.weighted.scorer)}, beforehand", term.tile)
        names = " ".join(f"{term.weighted.weight:+g} {name_of(term.weighted.scorer)}" for term in terms)
        yield Step.fused("score", names, self._scores(tiles))

    def _column(self, name: str, tile: Tile) -> Step:
        if tile.column_traffic is None:
            return Step.fused("score", name, Traffic(launches=0), "does not say what it moves")
        columns = (self.columns[column] for column in ("keys", "values", POSITIONS))
        traffic = tile.column_traffic(ColumnRequest(self.segments, *columns), self._lengths)
        return Step.fused("score", name, traffic, "at most")

    def _scores(self, tiles: Sequence[Tile]) -> Traffic:
        from kvpolicy_kernels.score.score import traffic
        from kvpolicy_kernels.score.window_queries import WindowQueries

        plan, window = self.plan, None
        if any(tile.window for tile in tiles):
            size = (1, plan.geometry.query_heads, plan.needs.queries, plan.geometry.head_dim)
            queries = torch.empty(size, dtype=plan.dtype, device="meta")
            positions = torch.empty(1, plan.needs.queries, dtype=torch.int32, device="meta")
            window = WindowQueries.of([queries], [positions], self.segments, 1.0)
        columns = {name: self.columns[name] for name in _READ_BY_SCORES if name in self.columns}
        return traffic(self.segments, columns, window, tiles, self._lengths, pinned=self._pinned)

    def finish(self) -> Step:
        """Pooling, normalisation, weights and the sum."""
        from kvpolicy_kernels.score.postprocess import traffic

        sinks, recent = self.shapes.protected
        finishes = [term.postprocess for term in self.plan.fusion.terms]
        sizes = {"heads": self.plan.geometry.kv_heads, "sinks": sinks, "recent": recent}
        moved = traffic(finishes, self._lengths, self.shapes.held, **sizes, pinned=self._pinned)
        return Step.fused("score", "pool, normalise, add", moved)

    def allocate(self) -> Step:
        """Budgets of heads that compete follow from how many of the best entries each owns."""
        from kvpolicy_kernels.select.select import counts_traffic

        name = name_of(self.plan.spec.allocate.divider)
        if not self.plan.ragged:
            return Step.fused("allocate", name, Traffic(launches=0), "follows from lengths")
        return Step.fused("allocate", name, counts_traffic(self.segments, self._lengths, **self._protected))

    def select(self) -> Step:
        """Keep indices."""
        from kvpolicy_kernels.select.select import traffic

        moved = traffic(self.segments, self._lengths, self.shapes.kept, **self._protected)
        return Step.fused("select", name_of(self.plan.spec.select), moved)

    def compact(self) -> Step:
        """All columns, at most: those in front of the first entry that leaves stay where they are.

        Heads of different lengths are laid out anew, in new storage.
        """
        from kvpolicy_kernels.compact.compact import traffic, traffic_to

        heads, name = self.plan.geometry.kv_heads, name_of(self.plan.spec.merge)
        width, kept, held = self.shapes.kept, self.shapes.kept * heads, self.shapes.held * heads
        if self.plan.ragged:
            copied = traffic_to(self.segments, self.columns, width, kept=kept)
            return Step.fused("compact", name, copied, "into new storage")
        moved = traffic(self.segments, self.columns, width, ordered=True, held=held, kept=kept, moved=kept)
        return Step.fused("compact", name, moved, "at most")
