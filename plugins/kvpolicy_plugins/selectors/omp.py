"""Selector `omp`: entries whose exponentials, weighted, give the attention mass of all (Attention Matching, OMP)."""

import math
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Integer, Needs, Number, SelectionRequest, Selector, View, parameter
from kvpolicy.stages.ordering import highest
from kvpolicy_plugins.shared.least_squares import ridge_towards, square_norm
from kvpolicy_plugins.shared.limits import QUERIES
from kvpolicy_plugins.shared.window_attention import WindowAttention

_LEAST = 1e-12  # of a factor
_ROUNDS = 3  # in which weak entries are replaced


@attrs.frozen
class OMP(Selector):
    """Entries chosen one by one, each for the mass that those before it leave: orthogonal matching pursuit.

    For the n queries of a KV head, the last `queries` of its G query heads stacked; with the logits a of the
    candidates, log-votes included, m = the largest of a query, and E = exp(a - m):

    1. y = the sum of E over the candidates, the mass; r = y - M f is what is left of it, M = E of those chosen so far;
    2. the `per_step` candidates with the largest Eᵀ r, signed and not normalised, are chosen;
    3. after every `refit_every` such steps, f minimises |M f - y|² + ridge · |M|² · |f - 1|², clamped to at most
       e^`bound`, as in the merger `attention_matching`; in between those that are new have no part in r;
    4. when as many are chosen as stay, those whose f is below e^`drop_below` are given up, and others chosen in their
       place; at most three times. Where too few are left, the highest scores of the rest stay, too.

    Scores count for nothing else, but candidates whose score is NaN come last. Queries with an exponential that is not
    finite have no part. The authors use no ridge, and far more queries than entries that stay; without, what is chosen
    behind the first n entries depends on rounding, because nothing is left of the mass.

    Costs per KV head: n · T products for each of N / `per_step` steps, T candidates of which N stay, and a solve of
    min(n, N) unknowns for each refit, about n · N · min(n, N) products; it holds n · T numbers twice, in float64. With
    n = 256, T = 4096, N = 960 and the authors' fast variant, `per_step: 4, refit_every: 2`, that is two seconds of a
    CPU core; a prompt has one choice per head and layer. The host waits once for how many stay, and once a round.
    """

    name: ClassVar[str] = "omp"
    reference: ClassVar[str] = "arXiv:2602.16284"

    queries: int = parameter(QUERIES, 64, help="W, how many of the last queries tell the mass")
    per_step: int = parameter(Integer(minimum=1, maximum=4096), 1, help="entries chosen at a time (k_choice)")
    refit_every: int = parameter(Integer(minimum=1, maximum=4096), 1, help="steps between fits (nnls_interval)")
    ridge: float = parameter(Number(minimum=0, maximum=1e6), 0.01, help="how strongly factors are held near 1")
    bound: float = parameter(Number(minimum=0, maximum=20), 7.0, help="largest logarithm of a factor")
    drop_below: float = parameter(Number(minimum=-27, maximum=0), -7.0, help="logarithm of a factor that is too small")

    def needs(self) -> Needs:
        return Needs(queries=self.queries)

    def second_scores(self, view: View) -> Tensor:
        """E, float32 [B, K, n, T]: probabilities over the largest one of a query; 0 outside the candidates."""
        window = WindowAttention.of(view, self.queries, candidates_only=True)
        tiny = torch.finfo(torch.float32).tiny
        found = [own / own.amax(-1, keepdim=True).clamp(min=tiny) for _, own in window.probabilities(view)]
        rows, heads, slots = view.positions.shape
        return torch.cat(found, 1).reshape(rows, heads, -1, slots)

    def select(self, request: SelectionRequest) -> Tensor:
        if request.second_scores is None:
            raise ValueError("omp is not told the attention: give it what its second_scores returned")
        sound = request.candidates & ~request.scores.isnan()
        counts = request.counts.minimum(sound.sum(-1))
        counts = counts.masked_fill(request.counts == request.candidates.sum(-1), 0)  # all stay, without a choice
        picks = self.picks(request.second_scores.flatten(0, 1), sound.flatten(0, 1), counts.flatten())
        stays = _among(picks, sound.flatten(0, 1)).view_as(sound)
        rest = highest(request.scores, request.candidates & ~stays, request.counts - stays.sum(-1))
        return stays | rest

    def picks(self, exponentials: Tensor, candidates: Tensor, counts: Tensor) -> Tensor:
        """Slots in the order in which they are chosen, int64 [H, P]; -1 where one was given up, or none was needed.

        `exponentials` [H, n, T], of which a head may choose `counts` [H] of the `candidates` bool [H, T].
        """
        matrix = exponentials.double()
        matrix = matrix.masked_fill(~matrix.isfinite().all(-1, keepdim=True), 0.0)
        mass, free = matrix.sum(-1), candidates
        picks = self._chosen(matrix, mass, free, counts, counts.new_empty(len(counts), 0))
        for _ in range(_ROUNDS):
            weak = (picks >= 0) & (self._factors(matrix, mass, picks) < math.exp(self.drop_below))
            if not bool(weak.any()):
                break
            free = free & ~_among(picks.where(weak, -1), free)
            picks = self._chosen(matrix, mass, free, counts, picks.masked_fill(weak, -1))
        return picks

    def _chosen(self, matrix: Tensor, mass: Tensor, free: Tensor, counts: Tensor, picks: Tensor) -> Tensor:
        """The picks and behind them more, until each head has its count or nothing is left that is `free`."""
        free = free & ~_among(picks, free)
        missing = (counts - (picks >= 0).sum(-1)).minimum(free.sum(-1))
        left, places = self._left(matrix, mass, picks), torch.arange(self.per_step, device=picks.device)
        for step in range(1, 1 - (-int(missing.max()) // self.per_step)):
            worth = (left[:, None] @ matrix)[:, 0].masked_fill(~free, -torch.inf)
            best = worth.argsort(dim=-1, descending=True, stable=True)[:, : self.per_step]
            new = best.where(places[: best.shape[-1]] < missing[:, None], -1)
            picks, free = torch.cat([picks, new], 1), free & ~_among(new, free)
            missing = (missing - self.per_step).clamp(min=0)
            if step % self.refit_every == 0:
                left = self._left(matrix, mass, picks)
        return picks

    def _left(self, matrix: Tensor, mass: Tensor, picks: Tensor) -> Tensor:
        """r, [H, n]."""
        fitted = _columns(matrix, picks) @ self._factors(matrix, mass, picks)[..., None]
        return mass - fitted[..., 0]

    def _factors(self, matrix: Tensor, mass: Tensor, picks: Tensor) -> Tensor:
        """f, [H, P]; those of picks that are none are multiplied with nothing."""
        chosen = _columns(matrix, picks)
        ones = torch.ones_like(picks, dtype=matrix.dtype)[..., None]
        found = ridge_towards(chosen, mass[..., None], ones, self.ridge, square_norm(chosen))
        return found[..., 0].clamp(_LEAST, math.exp(self.bound))


def _columns(matrix: Tensor, picks: Tensor) -> Tensor:
    """The columns [H, n, P] of a matrix [H, n, T]; zeros for picks that are none."""
    index = picks.clamp(min=0)[:, None].expand(-1, matrix.shape[1], -1)
    return matrix.gather(-1, index).masked_fill(picks[:, None] < 0, 0.0)


def _among(picks: Tensor, slots: Tensor) -> Tensor:
    """Which slots were picked, bool like `slots` [H, T]."""
    longer = torch.zeros(len(slots), slots.shape[-1] + 1, dtype=torch.bool, device=slots.device)
    return longer.scatter(-1, picks.where(picks >= 0, slots.shape[-1]), value=True)[:, :-1]
