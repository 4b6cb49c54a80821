"""Layers that are compressed together, scored and selected from in kernels, one launch for all of them.

What has no tile function, or is no plain choice of the best, runs its reference in between.
"""

from collections.abc import Sequence

import attrs
from torch import Tensor

from kvpolicy.plan.compress.blocks import Block
from kvpolicy.plan.compress.fusion import Fusion, Term
from kvpolicy.plan.compress.layers import Layers
from kvpolicy.plan.compress.score import scored
from kvpolicy.plan.compress.scored import ScoredLayers, Selection
from kvpolicy.plan.forward_observers import state_name
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.stages import View
from kvpolicy_kernels.score.tile import ColumnRequest, Tile


class FusedLayers(ScoredLayers):
    """As few passes over the entries as the policy allows.

    Raises UnsupportedInputError, from any of its methods, for views that kernels cannot address.
    """

    def __init__(self, spec: PolicySpec, fusion: Fusion, views: Sequence[View]) -> None:
        self.fusion, self.layers = fusion, Layers.of(views)
        super().__init__(spec, views)

    def shown(self) -> tuple[Block, ...]:
        return tuple(map(Block, self.views))  # launches are for all layers anyway

    def score(self) -> None:
        from kvpolicy_kernels.score.postprocess import postprocess

        layers, fusion = self.layers, self.fusion
        tiled = [term for term in fusion.terms if term.tile is not None]
        others = [(index, term) for index, term in enumerate(fusion.terms) if term.tile is None]
        terms = layers.empty(len(fusion.terms))
        _run_tiles([term.tile for term in tiled if term.tile is not None], layers, terms[: len(tiled)])
        for out, (index, term) in zip(terms[len(tiled) :], others, strict=True):
            self._run_reference(term, state_name(index, ""), out)
        finishes = [term.postprocess for term in tiled + [term for _, term in others]]
        positions = layers.columns["positions"]
        self.total, nan = postprocess(layers.segments, positions, terms, finishes, **layers.protect)
        self.scores = self.block_scores = layers.per_view(self.total)
        self.nan = layers.counted(nan).sum(-1)
        self.room, self.protected = layers.counted(layers.room), layers.counted(layers.protected)

    def _run_reference(self, term: Term, prefix: str, out: Tensor) -> None:
        per_view = self.layers.per_view(out)
        for view, rows, noted in zip(self.views, per_view, self.observed, strict=True):
            scores, fresh = scored(term.weighted.scorer, prefix, view)
            rows.copy_(scores)
            noted.update(fresh)

    def won(self, best: Tensor) -> Tensor:
        from kvpolicy_kernels.select.select import counts_of_best

        layers = self.layers
        positions = layers.columns["positions"]
        owned = counts_of_best(self.total, layers.segments, best.flatten(), positions=positions, **layers.protect)
        return layers.counted(owned).long()

    def select(self, counts: Tensor) -> Selection:
        if self.fusion.select:
            return super().select(counts)
        return Best(self, counts)

    def forget_entries(self) -> None:
        super().forget_entries()
        self.layers = attrs.evolve(self.layers, columns={"positions": self.layers.columns["positions"]})


@attrs.frozen(eq=False)
class Best:
    """A selection that has been decided on, and is written down once it is known how long it gets."""

    group: FusedLayers
    counts: Tensor  # int64 [L, B, K], candidates to keep

    @property
    def lengths(self) -> Tensor:
        return self.counts + self.group.protected

    def indices(self, widths: Sequence[int]) -> list[Tensor]:
        from kvpolicy_kernels.select.select import select

        layers = self.group.layers
        positions, counts, most = layers.columns["positions"], self.counts.flatten(), max(widths)
        kept = select(self.group.total, layers.segments, counts, most, positions=positions, **layers.protect)
        return [slots[..., :width].long() for slots, width in zip(layers.per_layer(kept), widths, strict=True)]


def _run_tiles(tiles: Sequence[Tile], layers: Layers, out: Tensor) -> None:
    from kvpolicy_kernels.score.score import scores

    if not tiles:
        return
    request = ColumnRequest(layers.segments, *(layers.columns[name] for name in ("keys", "values", "positions")))
    extra = [None if tile.column is None else tile.column(request) for tile in tiles]
    window = layers.window() if any(tile.window for tile in tiles) else None
    scores(layers.segments, layers.columns, window, tiles, extra, **layers.protect, out=out)
