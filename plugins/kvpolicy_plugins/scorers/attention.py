"""What the last queries attend to."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Choice, Flag, Integer, Needs, Nested, Number, Scorer, View, parameter
from kvpolicy_plugins.grouping import GROUP, reduce_group
from kvpolicy_plugins.pooling import Pool


@attrs.frozen
class Attention(Scorer):
    """Attention that the observation window pays to each entry, as in SnapKV (section 4) and its successors.

    1. probabilities = softmax(scaling · q·k) of the last W queries, [B, K, G, W, T];
    2. over the queries: mean (or sum), plus `deviation` times the standard deviation (CAKE, eq. 8);
    3. pooling over neighbouring candidates; 4. one value per KV head out of its G query heads.

    `group_at` says what step 4 reduces: the pooled scores (as written), the scores before pooling (Ada-KV),
    the probabilities before step 2 (G-KV), or the logits before step 1 (R-KV). TOVA: one query, `shared`.
    """

    name: ClassVar[str] = "attention"
    reference: ClassVar[str] = "arXiv:2404.14469"

    queries: int = parameter(Integer(minimum=1), 32, help="W, how many of the last queries vote")
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
        Number(minimum=0), 0.0, help="weight of the standard deviation over the queries (CAKE)"
    )
    causal: bool = parameter(Flag(), True, help="hide from each query what came after it")
    shared: bool = parameter(Flag(), False, help="average over KV heads: all heads of a layer keep one set")

    def needs(self) -> Needs:
        return Needs(queries=self.queries)

    def score(self, view: View) -> Tensor:
        voters = self._voters(view)
        logits = self._group(view.logits[..., -self.queries :, :], "logits")
        probabilities = self._softmax(logits, view, voters)
        scores = self._over_queries(self._group(probabilities, "probabilities"), voters)
        scores = self.pool(self._group(scores, "scores"), view.candidates[:, :, None])
        scores = self._group(scores, "pooled").squeeze(2)
        return scores.mean(1, keepdim=True).expand_as(scores) if self.shared else scores

    def _voters(self, view: View) -> Tensor:
        """Positions [B, W] of the queries that vote; a row with fewer than W tokens has -1 in front."""
        return view.window_positions[:, -self.queries :]

    def _group(self, grouped: Tensor, at: str) -> Tensor:
        return reduce_group(grouped, self.group) if at == self.group_at else grouped

    def _softmax(self, logits: Tensor, view: View, voters: Tensor) -> Tensor:
        """Probabilities [B, K, G, W, T]; a query that sees nothing gives zeros, not NaN."""
        region = view.valid if self.softmax == "all" else view.candidates
        asked = voters[:, None, None, :, None]
        visible = region[:, :, None, None] & (asked >= 0)
        if self.causal:
            visible = visible & (view.positions[:, :, None, None] <= asked)
        return logits.masked_fill(~visible, -torch.inf).softmax(-1).masked_fill(~visible, 0.0)

    def _over_queries(self, probabilities: Tensor, voters: Tensor) -> Tensor:
        """[B, K, G, W, T] to [B, K, G, T]; queries that a row never had are not counted."""
        asked = (voters >= 0)[:, None, None, :, None]
        count = asked.sum(-2).clamp(min=1)
        total = probabilities.sum(-2)
        scores = total / count if self.reduce == "mean" else total
        if not self.deviation:
            return scores
        spread = (probabilities - (total / count).unsqueeze(-2)).masked_fill(~asked, 0.0)
        variance = spread.square().sum(-2) / (count - 1).clamp(min=1)
        return scores + self.deviation * variance.sqrt()
