"""Selector `mass_segments`: stretches of equal attention mass, each of which keeps some (AMS)."""

import math
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Integer, Needs, Nested, Number, SelectionRequest, Selector, View, parameter
from kvpolicy.stages.ordering import highest
from kvpolicy_plugins.allocators.shared.apportion import swept
from kvpolicy_plugins.scorers.shared.pooling import Pool
from kvpolicy_plugins.selectors.shared.ranking import group_ranks
from kvpolicy_plugins.selectors.shared.segments import Segments, segments_of
from kvpolicy_plugins.shared.limits import QUERIES
from kvpolicy_plugins.shared.window_attention import WindowAttention


@attrs.frozen
class MassSegments(Selector):
    """Cuts the candidates of a head into segments of equal attention mass, and each keeps its best.

    Adaptive mass-segmented compression, as in the authors' code: a ranking of all candidates may wipe out whole
    stretches of the context.

    1. Mass: attention of the last `queries` queries to the candidates, pooled, as shares of their sum.
    2. A cut before each candidate at which the sum of the masses reaches a multiple of `mass`; segments longer than
       `longest` are cut every `longest` candidates; then each takes in what follows until it has `shortest`.
    3. Quotas: min(`least`, length) each. If that is more than the head keeps, segments give one back in turn; else the
       rest is shared out by mass, rounded, no more than there are, and made exact by one more or less in turn.
    4. Each segment keeps as many of its highest scores.

    The code cuts all that is held, recent entries with the largest mass of all; here what is protected is not cut. It
    never ends where there are more segments than entries to keep: here those of the largest mass keep one each. Its
    credit, an average of the mass over compressions, is left out. Candidates whose score is NaN are in no segment, and
    come last.
    """

    name: ClassVar[str] = "mass_segments"
    reference: ClassVar[str] = "arXiv:2605.23200"

    queries: int = parameter(QUERIES, 32, help="W, how many of the last queries tell the mass")
    pool: Pool = parameter(Nested(Pool), Pool("average", 5), help="smoothing of the mass over neighbouring candidates")
    mass: float = parameter(Number(minimum=1e-3, maximum=1), 0.02, help="share of the mass that a segment has")
    shortest: int = parameter(Integer(minimum=1), 32, help="candidates of a segment, at least; the last may have fewer")
    longest: int = parameter(Integer(minimum=1), 1024, help="length above which a segment is cut before it is merged")
    least: int = parameter(Integer(minimum=0), 8, help="candidates that each segment keeps if it has them")

    def __attrs_post_init__(self) -> None:
        if self.shortest > self.longest:
            raise ParameterError(f"shortest: must be <= longest, which is {self.longest}: {self.shortest}")

    def needs(self) -> Needs:
        return Needs(queries=self.queries)

    def second_scores(self, view: View) -> Tensor:
        """Attention before it is made a share of its sum, float32 [B, K, T]."""
        window = WindowAttention.of(view, self.queries, candidates_only=True)
        means = [
            (probabilities.sum(-2) / window.count[:, heads]).mean(2)
            for heads, probabilities in window.probabilities(view)
        ]
        return self.pool.over(view, torch.cat(means, 1).view(view.positions.shape))

    def select(self, request: SelectionRequest) -> Tensor:
        if request.second_scores is None:
            raise ValueError("mass_segments is not told the attention: give it what its second_scores returned")
        sound = request.candidates & ~request.scores.isnan()
        counts = torch.minimum(request.counts, sound.sum(-1))
        segments = self.segments(request.second_scores, sound)
        quotas = self.quotas(segments, counts)
        before = segments.lengths.cumsum(-1) - segments.lengths
        ranks = group_ranks(segments.ids, request.scores, sound) - before.gather(-1, segments.ids)
        rest = highest(request.scores, request.candidates & ~sound, request.counts - counts)
        return rest | (sound & (ranks < quotas.gather(-1, segments.ids)))

    def segments(self, attention: Tensor, inside: Tensor) -> Segments:
        """The segments of the slots that are `inside`, bool [B, K, T]; `attention` is float32 of the same shape."""
        mass = (attention.double().nan_to_num(0.0, 0.0, 0.0).clamp(min=0) + 1e-12).masked_fill(~inside, 0.0)
        mass = mass / mass.sum(-1, keepdim=True).clamp(min=1e-12)
        steps = torch.arange(1, math.ceil(1 / self.mass - 1e-9), dtype=torch.float64, device=mass.device)
        return segments_of(mass, inside, steps * self.mass, self.shortest, self.longest)

    def quotas(self, segments: Segments, counts: Tensor) -> Tensor:
        """Candidates that stay of each segment, int64 [B, K, S]: `counts` [B, K] in all, none above its length."""
        lengths = segments.lengths
        start = lengths.clamp(max=self.least)
        over = (start.sum(-1) - counts).clamp(min=0)
        fewer = start - swept((start - 1).clamp(min=0), over)
        fewer = fewer.where(highest(segments.mass.float(), fewer > 0, counts.minimum((fewer > 0).sum(-1))), 0)
        rest = (counts - start.sum(-1)).clamp(min=0)[..., None]
        quotas = lengths.minimum(start + (rest * segments.mass).round().long())
        missing = counts - quotas.sum(-1)
        quotas = quotas + swept(lengths - quotas, missing.clamp(min=0)) - swept(quotas - start, (-missing).clamp(min=0))
        return quotas.where(over[..., None] == 0, fewer)
