"""Selector `critical`: what changes the output of attention most when it is evicted (CriticalKV)."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Needs, Number, SelectionRequest, Selector, View, output_norms, parameter
from kvpolicy.stages.ordering import highest


@attrs.frozen
class Critical(Selector):
    """Two stages, of which the second minimises an upper bound of how much eviction perturbs the attention's output.

    With the score s_i of an entry, its value v_i, and the slice W_g [Dv, C] of the output projection for query head g:

    1. n_i = mean over the heads g of the GQA group of ‖v_i W_g‖₁, the sum over the C output channels;
    2. of the `counts` candidates that a head keeps, the floor(counts · `first_stage`) with the highest s_i stay;
    3. the others are those with the highest (s_i + `epsilon`) · n_i among the rest.

    The bound assumes that s is attention, which is not negative, and that the first stage keeps more than half of it.
    With an allocator that shares a layer's budget out by score (`adaptive`), this is CriticalAdaKV. The published code
    counts the observation window, whose scores are infinite, as part of the first stage; here both stages are of the
    candidates beside it. The bias of the projection is left out, as in the code. Entries whose projected value is not
    finite come after all others whose score is a number.

    Models whose output projection is not known are refused when a plan is made. Its weight is read from the model at
    every compression, so that an adapter that is merged into it counts from then on.
    """

    name: ClassVar[str] = "critical"
    reference: ClassVar[str] = "arXiv:2502.03805"

    first_stage: float = parameter(
        Number(minimum=0, maximum=1), 0.5, help="of the candidates that stay, the share that is chosen by score alone"
    )
    epsilon: float = parameter(Number(minimum=0, maximum=1e6), 1e-4, help="added to scores in the second stage")

    def needs(self) -> Needs:
        return Needs(output_projection=True)

    def second_scores(self, view: View) -> Tensor:
        """n_i, float32 [B, K, T], NaN where it is not finite."""
        norms = output_norms(view.values, view.projection, order=1).mean(2)
        return norms.masked_fill(~norms.isfinite(), torch.nan)

    def select(self, request: SelectionRequest) -> Tensor:
        norms, scores = request.second_scores, request.scores
        if norms is None:
            raise ValueError("critical is not told the projected values: give it what its second_scores returned")
        share = (request.counts.double() * self.first_stage + 1e-9).floor().long()
        first = highest(scores, request.candidates, share)
        worth = (scores + self.epsilon) * norms
        worth = worth.masked_fill(worth.isnan() & ~scores.isnan(), -torch.inf)
        return first | highest(worth, request.candidates & ~first, request.counts - share)
