"""The bytes that kernels address in one compression of one layer and sequence, launch by launch.

They are what the launchers say of themselves; a test counts them in the interpreter.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import attrs
import torch

from kvpolicy.plan.compress.fusion import Term
from kvpolicy.plan.followers import ATTENTION
from kvpolicy.plan.plan import LOG_VOTES, POSITIONS, Plan
from kvpolicy.plan.steps import Shapes, Step
from kvpolicy.stages.registry import registry
from kvpolicy_kernels import Column, Segments, Tile, Traffic
from kvpolicy_kernels.score.tile import ColumnRequest


@attrs.frozen(eq=False)
class Imagined:
    """One layer and sequence of a plan: tensors without data, as long as `shapes` say."""

    plan: Plan
    segments: Segments
    lengths: tuple[int, ...]
    columns: dict[str, Column]

    @classmethod
    def of(cls, plan: Plan, shapes: Shapes) -> "Imagined":
        """K heads that hold T entries each."""
        geometry, heads = plan.geometry, plan.geometry.kv_heads
        starts = torch.empty(heads, dtype=torch.int64, device="meta")
        segments = Segments(starts, starts.to(torch.int32), 1, 1, heads, shapes.held)
        kinds = {name: (column.dtype, prod(column.shape)) for name, column in plan.columns.items()}
        kinds |= dict.fromkeys(("keys", "values"), (plan.dtype, geometry.head_dim))
        columns = {name: Column(starts[:1], dtype, width, ()) for name, (dtype, width) in kinds.items()}
        return cls(plan, segments, (shapes.held,) * heads, columns)

    @property
    def read_columns(self) -> dict[str, Column]:
        """Those that scores may read."""
        names = ("keys", "values", POSITIONS, ATTENTION, LOG_VOTES)
        return {name: self.columns[name] for name in names if name in self.columns}


def score_steps(plan: Plan, shapes: Shapes, terms: Sequence[Term]) -> Iterator[Step]:
    """Columns that scorers compute beforehand, then all tile functions, the statistics before them included."""
    imagined, tiles = Imagined.of(plan, shapes), [term.tile for term in terms if term.tile is not None]
    if not tiles:
        return
    for term in terms:
        if term.tile is not None and term.tile.column is not None:
            yield _column(imagined, term, term.tile)
    names = " ".join(f"{term.weighted.weight:+g} {registry().reference(type(term.weighted.scorer))}" for term in terms)
    yield Step.fused("score", names, _scores(imagined, tiles))


def _column(imagined: Imagined, term: Term, tile: Tile) -> Step:
    name = registry().reference(type(term.weighted.scorer))
    if tile.column_traffic is None:
        return Step.fused("score", f"{name}, beforehand", Traffic(launches=0), "does not say what it moves")
    columns = (imagined.columns[one] for one in ("keys", "values", POSITIONS))
    traffic = tile.column_traffic(ColumnRequest(imagined.segments, *columns), imagined.lengths)
    return Step.fused("score", f"{name}, beforehand", traffic, "at most")


def _scores(imagined: Imagined, tiles: Sequence[Tile]) -> Traffic:
    from kvpolicy_kernels.score.score import traffic
    from kvpolicy_kernels.score.window_queries import WindowQueries

    plan, window = imagined.plan, None
    if any(tile.window for tile in tiles):
        size = (1, plan.geometry.query_heads, plan.needs.queries, plan.geometry.head_dim)
        queries = torch.empty(size, dtype=plan.dtype, device="meta")
        positions = torch.empty(1, plan.needs.queries, dtype=torch.int32, device="meta")
        window = WindowQueries.of([queries], [positions], imagined.segments, 1.0)
    return traffic(imagined.segments, imagined.read_columns, window, tiles, imagined.lengths)


def finish_step(plan: Plan, shapes: Shapes) -> Step:
    """Pooling, normalisation, weights and the sum."""
    from kvpolicy_kernels.score.postprocess import traffic

    lengths, (sinks, recent) = (shapes.held,) * plan.geometry.kv_heads, shapes.protected
    finishes = [term.postprocess for term in plan.fusion.terms]
    sizes = {"heads": plan.geometry.kv_heads, "sinks": sinks, "recent": recent}
    return Step.fused("score", "pool, normalise, add", traffic(finishes, lengths, shapes.held, **sizes))


def allocate_step(plan: Plan, shapes: Shapes) -> Step:
    """Budgets of heads that compete follow from how many of the best entries each owns."""
    from kvpolicy_kernels.select.select import counts_traffic

    name, imagined = registry().reference(type(plan.spec.allocate.divider)), Imagined.of(plan, shapes)
    if not plan.ragged:
        return Step.fused("allocate", name, Traffic(launches=0), "follows from lengths")
    return Step.fused(
        "allocate", name, counts_traffic(imagined.segments, imagined.lengths, **_protected(imagined, shapes))
    )


def select_step(plan: Plan, shapes: Shapes) -> Step:
    """Keep indices."""
    from kvpolicy_kernels.select.select import traffic

    imagined, name = Imagined.of(plan, shapes), registry().reference(type(plan.spec.select))
    moved = traffic(imagined.segments, imagined.lengths, shapes.kept, **_protected(imagined, shapes))
    return Step.fused("select", name, moved)


def compact_step(plan: Plan, shapes: Shapes) -> Step:
    """All columns, at most: those in front of the first entry that leaves stay where they are.

    Heads of different lengths are laid out anew, in new storage.
    """
    from kvpolicy_kernels.compact.compact import traffic, traffic_to

    imagined, heads = Imagined.of(plan, shapes), plan.geometry.kv_heads
    held, kept, name = shapes.held * heads, shapes.kept * heads, registry().reference(type(plan.spec.merge))
    if plan.ragged:
        copied = traffic_to(imagined.segments, imagined.columns, shapes.kept, kept=kept)
        return Step.fused("compact", name, copied, "into new storage")
    moved = traffic(imagined.segments, imagined.columns, shapes.kept, ordered=True, held=held, kept=kept, moved=kept)
    return Step.fused("compact", name, moved, "at most")


def _protected(imagined: Imagined, shapes: Shapes) -> dict[str, Any]:
    sinks, recent = shapes.protected
    return {"recent": recent, "positions": imagined.columns[POSITIONS] if sinks else None}
