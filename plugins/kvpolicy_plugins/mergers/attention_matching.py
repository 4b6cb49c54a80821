"""Merger `attention_matching`: fits log-votes and values of the entries that stay to the attention over all of them."""

import math
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Entries, Integer, Merger, Needs, Number, View, parameter
from kvpolicy.stages.slots import gather, take
from kvpolicy_plugins.mergers.shared.merged_entries import changed_entries, kept_with_votes, log_votes_of
from kvpolicy_plugins.mergers.shared.window_logits import softmax, window_of
from kvpolicy_plugins.shared.least_squares import ridge_towards, square_norm, within_bounds
from kvpolicy_plugins.shared.limits import QUERIES_OR_ALL


@attrs.frozen
class AttentionMatching(Merger):
    """Log-votes and values with which kept candidates give the attention that all candidates gave (Attention Matching).

    For the n observed queries of a KV head, those of its G query heads stacked; with the logits a of the candidates,
    log-votes included, m = the largest of a query, E = exp(a - m), and M = E of the candidates that stay:

    1. mass: factors f near 1 that minimise |M f - sum of E|², within e^±bound: least squares, clamped, then
       `iterations` projected gradient steps; the log of f is added to the log-votes;
    2. values: X = softmax of the kept candidates' logits with the new log-votes, Y = the output over all candidates;
       the values V that minimise |X V - Y|² + ridge · |X|² · |V - kept values|². In step 1 `ridge` holds f near 1.

    Keys stay. Protected entries take no part: they stay as they are. A head that loses nothing is left as it is.

    The authors use no ridge, or one towards 0, and thousands of queries from reading the context again, 4 and more for
    each entry that stays; with the few of the window they would be interpolated. Their code forgets the log-votes that
    kept entries have had, which are kept here. Selection by the highest attention: `attention` with `reduce: rms`; by
    orthogonal matching pursuit: the selector `omp`, with `bound: 7` and `iterations: 0` here.
    """

    name: ClassVar[str] = "attention_matching"
    reference: ClassVar[str] = "arXiv:2602.16284"
    votes: ClassVar[bool] = True
    reads_window: ClassVar[bool] = True

    ridge: float = parameter(Number(minimum=0, maximum=1e6), 0.01, help="how strongly values and votes are held")
    bound: float = parameter(Number(minimum=0, maximum=20), 3.0, help="most that is added to a log-vote, either way")
    iterations: int = parameter(Integer(minimum=0, maximum=1000), 2, help="projected gradient steps for the votes")
    queries: int = parameter(QUERIES_OR_ALL, 0, help="how many of the last queries are fitted; 0 = all observed")

    def needs(self) -> Needs:
        return Needs(queries=self.queries)

    def merge(self, view: View, kept: Tensor) -> Entries:
        if not kept.shape[-1]:
            return kept_with_votes(view, kept)
        keys, values = gather(view.keys, kept), gather(view.values, kept)
        votes, stays = gather(log_votes_of(view), kept), gather(view.candidates, kept)
        changed = stays & (view.candidates.sum(-1) > stays.sum(-1))[..., None]
        logits = window_of(view, self.queries).logits.flatten(2, 3).double()  # [B, K, n, T]
        logits = logits.masked_fill(~view.candidates[:, :, None], -torch.inf)
        own = take(logits.mT, kept.clamp(min=0)).mT.masked_fill(~changed[:, :, None], -torch.inf)  # [B, K, n, N]
        factors = self.factors(logits, own)
        whole = view.values.double().masked_fill(~view.candidates[..., None], 0.0)
        fitted = self.fitted_values(own + factors.log()[:, :, None], softmax(logits) @ whole, values.double())
        return changed_entries(view, kept, changed, (keys, fitted, votes + factors.log().float()))

    def factors(self, logits: Tensor, own: Tensor, start: Tensor | None = None) -> Tensor:
        """The factors f [..., N], of the logits of all candidates [..., n, T] and of those that stay [..., n, N].

        Float64; -inf where a query does not see an entry, or there is none. `start` [..., N] as in `square_norm`.
        """
        largest = logits.amax(-1, keepdim=True)
        largest = largest.masked_fill(largest == -torch.inf, 0.0)
        mass, matrix = (logits - largest).exp().sum(-1), (own - largest).exp()
        square = square_norm(matrix, start)
        prior = torch.ones_like(matrix[..., 0, :, None])
        found = ridge_towards(matrix, mass[..., None], prior, self.ridge, square)[..., 0]
        return within_bounds(
            matrix, mass, found, (math.exp(-self.bound), math.exp(self.bound)), square, self.iterations
        )

    def fitted_values(self, own: Tensor, outputs: Tensor, values: Tensor) -> Tensor:
        """Values [..., N, Dv] near `values` that give `outputs` [..., n, Dv] by the logits `own` [..., n, N]."""
        weights = softmax(own)
        return ridge_towards(weights, outputs, values, self.ridge, square_norm(weights))
