"""Scorer `attention`: attention of the last queries."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import (
    Choice,
    Flag,
    Needs,
    Nested,
    Number,
    Postprocess,
    Scorer,
    Tile,
    View,
    WindowUse,
    parameter,
)
from kvpolicy_plugins.scorers.shared.pooling import Pool
from kvpolicy_plugins.shared.gqa_group import GROUP, reduce_group
from kvpolicy_plugins.shared.limits import QUERIES
from kvpolicy_plugins.shared.window_attention import WindowAttention

_GROUP = Choice((*GROUP.words, "rms"))


@attrs.frozen
class Attention(Scorer):
    """Attention from the observation window to each entry, as in SnapKV (section 4) and its successors.

    1. probabilities = softmax(scaling · q·k) of the last W queries, [B, K, G, W, T];
    2. with `by_length`, those of each query times the number of held entries before it, which undoes that more entries
       share the attention of a later query (FINCH);
    3. over the queries: mean (or sum, largest, root mean square), plus `deviation` times their standard deviation
       (G-KV), or their variance where `spread` says so (CAKE, eq. 8);
    4. pooling over neighbouring candidates; 5. reduction of the G query heads to one value per KV head.

    `group_at` selects what step 5 reduces: the pooled scores (as written), the scores before pooling (Ada-KV),
    the probabilities before step 2 (G-KV), or the logits before step 1 (R-KV). TOVA: one query, `shared`.
    """

    name: ClassVar[str] = "attention"
    reference: ClassVar[str] = "arXiv:2404.14469"
    layers_as_rows: ClassVar[bool] = True

    queries: int = parameter(QUERIES, 32, help="W, how many of the last queries vote")
    softmax: str = parameter(
        Choice(("all", "candidates")), "all", help="which entries the probabilities are normalised over"
    )
    group: str = parameter(_GROUP, "mean", help="how the query heads of a KV head are reduced to one")
    group_at: str = parameter(
        Choice(("logits", "probabilities", "scores", "pooled")), "scores", help="what `group` reduces"
    )
    reduce: str = parameter(Choice(("mean", "sum", "max", "rms")), "mean", help="how the queries are reduced to one")
    pool: Pool = parameter(Nested(Pool), Pool(), help="smoothing over neighbouring candidates")
    deviation: float = parameter(
        Number(minimum=0, maximum=1e6), 0.0, help="weight of the standard deviation over the queries"
    )
    spread: str = parameter(
        Choice(("deviation", "variance")), "deviation", help="what `deviation` weighs: that, or the variance (CAKE)"
    )
    causal: bool = parameter(Flag(), True, help="hide later entries from each query")
    shared: bool = parameter(Flag(), False, help="average over KV heads: all heads of a layer keep the same entries")
    by_length: bool = parameter(
        Flag(), False, help="multiply the attention of each query by the number of held entries before it (FINCH)"
    )

    def needs(self) -> Needs:
        return Needs(queries=self.queries)

    def in_any_order(self) -> bool:
        return True

    def tile(self) -> Tile | str:
        if self.by_length:
            return "weighs queries by the entries before them"
        from kvpolicy_kernels.score.tiles.attention import NOWHERE, PROBABILITIES, SCORES, attention_votes
        from kvpolicy_kernels.score.tiles.grouping import HOW

        if "rms" in (self.group, self.reduce) or self.reduce == "max":
            return "takes the largest, or the root mean square, over queries"
        commutes = self.pool.kind in ("none", "max" if self.group == "max" else "average")
        if self.group_at == "pooled" and not commutes:
            return "pools each query head separately"
        grouped = {"logits": NOWHERE, "probabilities": PROBABILITIES}.get(self.group_at, SCORES)
        use = WindowUse(self.queries, self.softmax, self.causal, self.group if grouped == NOWHERE else "none")
        options = (grouped, HOW[self.group], int(self.reduce == "sum"), self._spread)
        postprocess = Postprocess(pool=self.pool.kind, size=self.pool.size, shared=self.shared)
        return Tile(attention_votes, options, (self.deviation,), window=use, keys=False, postprocess=postprocess)

    @property
    def _spread(self) -> int:
        """What the kernel adds to the mean: 0 nothing, 1 the standard deviation, 2 the variance."""
        return 0 if not self.deviation else 2 if self.spread == "variance" else 1

    def score(self, view: View) -> Tensor:
        window = WindowAttention.of(
            view, self.queries, candidates_only=self.softmax == "candidates", causal=self.causal
        )
        before = self._before(view) if self.by_length else None
        scores_of_heads = []
        for heads, logits in view.logits_by_head(self.queries):
            probabilities = window.softmax(self._group(logits, "logits"), heads)
            probabilities = self._group(probabilities, "probabilities")
            if before is not None:
                probabilities = probabilities * before[:, heads]
            scores_of_heads.append(self._over_queries(window, probabilities, heads))
        scores = torch.cat(scores_of_heads, 1).view(*view.keys.shape[:2], *scores_of_heads[0].shape[2:])
        scores = self.pool.over(view, self._group(scores, "scores"))
        scores = self._group(scores, "pooled").squeeze(2)
        if not self.shared:
            return scores
        return view.in_slots(view.in_sequence(scores).mean(1, keepdim=True).expand_as(scores))

    def _before(self, view: View) -> Tensor:
        """How many entries a head holds that are older than each query, float32 [1, B·K, 1, W, 1]."""
        positions, queries = view.in_sequence(view.positions), view.window_positions[:, -self.queries :]
        ascending = positions.masked_fill(positions < 0, torch.iinfo(positions.dtype).max)
        places = queries[:, None].expand(-1, positions.shape[1], -1).to(positions.dtype).contiguous()
        counts = torch.searchsorted(ascending.contiguous(), places).float()
        return counts.flatten(0, 1)[None, :, None, :, None]

    def _group(self, grouped: Tensor, at: str) -> Tensor:
        return reduce_group(grouped, self.group) if at == self.group_at else grouped

    def _over_queries(self, window: WindowAttention, probabilities: Tensor, heads: slice) -> Tensor:
        """[1, S, G, W, T] to [1, S, G, T]; queries that a row has not had do not count."""
        scores = self._reduced(probabilities, window.count[:, heads])
        if not self.deviation:
            return scores
        variance = window.variance(probabilities, heads)
        return scores + self.deviation * (variance if self.spread == "variance" else variance.sqrt())

    def _reduced(self, probabilities: Tensor, count: Tensor) -> Tensor:
        """[..., W, T] to [..., T]; queries that a row has not had are zeros, and `count` [..., 1] are those it had."""
        if self.reduce == "max":
            return probabilities.amax(-2)
        if self.reduce == "rms":
            return (probabilities.square().sum(-2) / count).sqrt()
        total = probabilities.sum(-2)
        return total / count if self.reduce == "mean" else total
