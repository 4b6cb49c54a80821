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


@attrs.frozen
class Attention(Scorer):
    """Attention from the observation window to each entry, as in SnapKV (section 4) and its successors.

    1. probabilities = softmax(scaling · q·k) of the last W queries, [B, K, G, W, T];
    2. over the queries: mean (or sum), plus `deviation` times the standard deviation (CAKE, eq. 8);
    3. pooling over neighbouring candidates; 4. reduction of the G query heads to one value per KV head.

    `group_at` selects what step 4 reduces: the pooled scores (as written), the scores before pooling (Ada-KV),
    the probabilities before step 2 (G-KV), or the logits before step 1 (R-KV). TOVA: one query, `shared`.
    """

    name: ClassVar[str] = "attention"
    reference: ClassVar[str] = "arXiv:2404.14469"

    queries: int = parameter(QUERIES, 32, help="W, how many of the last queries vote")
    softmax: str = parameter(
        Choice(("all", "candidates")), "all", help="which entries the probabilities are normalised over"
    )
    group: str = parameter(GROUP, "mean", help="how the query heads of a KV head are reduced to one")
    group_at: str = parameter(
        Choice(("logits", "probabilities", "scores", "pooled")), "scores", help="what `group` reduces"
    )
    reduce: str = parameter(Choice(("mean", "sum")), "mean", help="how the queries are reduced to one")
    pool: Pool = parameter(Nested(Pool), Pool(), help="smoothing over neighbouring candidates")
    deviation: float = parameter(
        Number(minimum=0, maximum=1e6), 0.0, help="weight of the standard deviation over the queries (CAKE)"
    )
    causal: bool = parameter(Flag(), True, help="hide later entries from each query")
    shared: bool = parameter(Flag(), False, help="average over KV heads: all heads of a layer keep the same entries")

    def needs(self) -> Needs:
        return Needs(queries=self.queries)

    def in_any_order(self) -> bool:
        return True

    def tile(self) -> Tile | str:
        from kvpolicy_kernels.score.tiles.attention import NOWHERE, PROBABILITIES, SCORES, attention_votes
        from kvpolicy_kernels.score.tiles.grouping import HOW

        commutes = self.pool.kind in ("none", "max" if self.group == "max" else "average")
        if self.group_at == "pooled" and not commutes:
            return "pools each query head separately"
        grouped = {"logits": NOWHERE, "probabilities": PROBABILITIES}.get(self.group_at, SCORES)
        use = WindowUse(self.queries, self.softmax, self.causal, self.group if grouped == NOWHERE else "none")
        options = (grouped, HOW[self.group], int(self.reduce == "sum"), int(self.deviation > 0))
        postprocess = Postprocess(pool=self.pool.kind, size=self.pool.size, shared=self.shared)
        return Tile(attention_votes, options, (self.deviation,), window=use, keys=False, postprocess=postprocess)

    def score(self, view: View) -> Tensor:
        voters = self._voters(view)
        hidden, slots = self._hidden(view, voters)
        query_exists = (voters >= 0).repeat_interleave(view.keys.shape[1], 0)[None, :, None, :, None]
        scores_of_heads = []
        for heads, logits in view.logits_by_head(self.queries):
            probabilities = _softmax(self._group(logits, "logits"), hidden[heads], slots)
            probabilities = self._group(probabilities, "probabilities")
            scores_of_heads.append(self._over_queries(probabilities, query_exists[:, heads]))
        scores = torch.cat(scores_of_heads, 1).view(*view.keys.shape[:2], *scores_of_heads[0].shape[2:])
        scores = self.pool.over(view, self._group(scores, "scores"))
        scores = self._group(scores, "pooled").squeeze(2)
        if not self.shared:
            return scores
        return view.in_slots(view.in_sequence(scores).mean(1, keepdim=True).expand_as(scores))

    def _voters(self, view: View) -> Tensor:
        """Positions [B, W] of the queries that vote; -1 first in rows with fewer than W tokens."""
        return view.window_positions[:, -self.queries :]

    def _group(self, grouped: Tensor, at: str) -> Tensor:
        return reduce_group(grouped, self.group) if at == self.group_at else grouped

    def _hidden(self, view: View, voters: Tensor) -> tuple[Tensor, Tensor | None]:
        """Which queries do not see which slots, bool [B·K, 1, W, S], and these slots [S]; None = all slots.

        All queries see entries older than the window, so on a CPU the mask covers the other slots only.
        """
        region = view.valid if self.softmax == "all" else view.candidates
        positions, slots = view.positions, None
        if positions.device.type == "cpu":
            oldest = voters.amin()
            seen = region & (positions <= oldest) if self.causal else region & (oldest >= 0)
            slots = (~seen).any(0).any(0).nonzero()[:, 0]
            region, positions = region[..., slots], positions[..., slots]
        query_positions = voters[:, None, :, None]
        visible = region[:, :, None] & (query_positions >= 0)
        if self.causal:
            visible = visible & (positions[:, :, None] <= query_positions)
        return ~visible.flatten(0, 1)[:, None], slots

    def _over_queries(self, probabilities: Tensor, query_exists: Tensor) -> Tensor:
        """[1, S, G, W, T] to [1, S, G, T]; `query_exists` marks the queries that a row has had; others do not count."""
        count = query_exists.sum(-2).clamp(min=1)
        total = probabilities.sum(-2)
        scores = total / count if self.reduce == "mean" else total
        if not self.deviation:
            return scores
        spread = (probabilities - (total / count).unsqueeze(-2)).masked_fill(~query_exists, 0.0)
        variance = spread.square().sum(-2) / (count - 1).clamp(min=1)
        return scores + self.deviation * variance.sqrt()


def _softmax(logits: Tensor, hidden: Tensor, slots: Tensor | None) -> Tensor:
    """Probabilities [1, S, G, W, T]; zeros, not NaN, for a query that sees no entry. Overwrites the logits."""
    if slots is None or len(slots) == logits.shape[-1]:
        return logits.masked_fill_(hidden, -torch.inf).softmax(-1).masked_fill_(hidden, 0.0)
    logits[..., slots] = logits[..., slots].masked_fill_(hidden, -torch.inf)
    return logits.softmax(-1)
