"""Selector `sample`: a draw by score, beside the largest value ranges (VaSE)."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Integer, Number, SelectionRequest, Selector, View, parameter
from kvpolicy.stages.ordering import highest
from kvpolicy_plugins.shared.limits import SEED
from kvpolicy_plugins.shared.seeded_draws import hashed

_DRAWS = 1  # tells these draws from those of the scorer `random` with the same seed


@attrs.frozen
class Sample(Selector):
    """Keeps the entries with the largest value ranges, and draws the others with chances in proportion to their scores.

    VaSE-AttnV, the mode `range_sink_sample_attn` of the authors' code, which formulas and defaults follow:

    1. range_t = max_d v_td - min_d v_td, and infinity for the first `sinks` tokens, whose values are small;
    2. the floor(`reserve` · N) candidates with the largest ranges stay, N being all that the head keeps, protected
       entries included, as in the authors' scripts (a quarter of the budget); no more than may stay;
    3. the others are drawn without replacement, each time with chances in proportion to the scores of those left.

    Drawing without replacement is the choice of the largest log(score) - log(e), e from Exp(1). Candidates whose score
    is 0 or negative come after all others, in the order of their positions; NaN comes last, whatever the range. Each e
    is a hash of `seed`, layer, head, the newest position of the row and the entry's own: a row draws the same alone and
    in a batch, whereas the code draws from one generator for a batch. The code raises an error where
    fewer entries than are drawn have a score above 0.
    """

    name: ClassVar[str] = "sample"
    reference: ClassVar[str] = "arXiv:2606.03928"

    reserve: float = parameter(
        Number(minimum=0, maximum=1), 0.25, help="of what a head keeps, the share that is chosen by value range"
    )
    sinks: int = parameter(Integer(minimum=0), 4, help="first tokens, which count as the largest ranges")
    seed: int = parameter(SEED, 0, help="seed of the draws")

    def second_scores(self, view: View) -> Tensor:
        """max_d v - min_d v in float32 [B, K, T]; NaN where that is not finite."""
        values = view.values.float()
        ranges = values.amax(-1) - values.amin(-1)
        return ranges.masked_fill(~ranges.isfinite(), torch.nan)

    def select(self, request: SelectionRequest) -> Tensor:
        return self.drawn(request, self._exponentials(request))

    def drawn(self, request: SelectionRequest, exponentials: Tensor) -> Tensor:
        """What stays where `exponentials`, float32 [B, K, T] above 0, are the draws; bool [B, K, T]."""
        reserved = self.reserved(request)
        rest = request.counts - reserved.sum(-1)
        return reserved | highest(_chances(request.scores, exponentials), request.candidates & ~reserved, rest)

    def reserved(self, request: SelectionRequest) -> Tensor:
        """The candidates that stay for their value ranges, sinks first; bool [B, K, T]."""
        ranges = request.second_scores
        if ranges is None:
            raise ValueError("sample is not told value ranges: give it what its second_scores returned")
        sound = request.candidates & ~request.scores.isnan()
        ranges = ranges.masked_fill((request.positions < self.sinks) & ~ranges.isnan(), torch.inf)
        protected = ((request.positions >= 0) & ~request.candidates).sum(-1)
        share = ((request.counts + protected).double() * self.reserve + 1e-9).floor().long()
        return highest(ranges, sound, share.minimum(request.counts).minimum(sound.sum(-1)))

    def _exponentials(self, request: SelectionRequest) -> Tensor:
        """Draws from Exp(1), float32 [B, K, T]: -log of 23 random bits, which are never 0 or 1."""
        positions = request.positions.long()
        heads = torch.arange(positions.shape[1], device=positions.device)[None, :, None]
        words = (_DRAWS, request.layer, heads, positions.amax((1, 2), keepdim=True), positions)
        return -((hashed(self.seed, *words, device=positions.device) >> 9).float() + 0.5).mul(2.0**-23).log()


def _chances(scores: Tensor, exponentials: Tensor) -> Tensor:
    """Float32 [B, K, T] in whose order entries are drawn; scores up to 0 are equal, and above -inf and NaN."""
    none = torch.where(scores > -torch.inf, torch.finfo(torch.float32).min, scores)
    return torch.where(scores > 0, scores.log() - exponentials.log(), none)
