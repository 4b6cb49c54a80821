"""Scorer `by_region`: lowers the scores of one region of the request, at once or with the tokens that follow it."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Integer, Needs, Number, Plugged, Scorer, Text, View, parameter
from kvpolicy_plugins.scorers.shared.around import ScorerAround


@attrs.frozen
class ByRegion(ScorerAround):
    """Scores of another scorer, of which the entries of a region keep only a share that shrinks as they age.

    With s the score of an entry of the region, l the lowest finite score among the candidates of its head, and n the
    tokens that came after the entry,

        s' = l + (s - l) * share * 2^(-n / half_life).

    Nothing changes for other entries, nor for scores that are not finite. With `share: 0` the region goes first: what
    is dropped as soon as room is needed, such as thinking. With `half_life: 512` it fades: results of tools. The newest
    spans of the region, as many as `newest` says, keep their scores: with `newest: 3` and `share: 0` all results of
    tools but the last three go first. Several regions are scorers around each other. What must stay is for
    `protect: {regions: [...]}`.

    That parts of an agent's context live for different times, and that some must be pinned, is measured in MemDecay
    (arXiv:2607.10582), whose formulas are not published: this one is ours.
    """

    name: ClassVar[str] = "by_region"

    of: Scorer = parameter(Plugged("score"), help="the scorer whose scores are lowered")
    region: str = parameter(Text(64, shortest=1), help="name of the region, which is given with the cache")
    share: float = parameter(Number(minimum=0, maximum=1), 1.0, help="the share of a score that is left at first")
    half_life: int = parameter(Integer(minimum=0), 0, help="tokens in which that share halves; 0 = it stays")
    newest: int = parameter(Integer(minimum=0), 0, help="how many of the region's newest spans keep their scores")

    def needs(self) -> Needs:
        inner = self.of.needs()
        return attrs.evolve(inner, regions=tuple(dict.fromkeys((*inner.regions, self.region))))

    def tile(self) -> str:
        return "goes by regions"

    def score(self, view: View) -> Tensor:
        scores = self.of.score(view)
        compared = view.candidates & scores.isfinite()
        lowest = scores.masked_fill(~compared, torch.inf).amin(-1, keepdim=True)
        lowered = lowest + (scores - lowest) * self._left(view)
        older = view.in_region(self.region, but_newest=self.newest)
        return torch.where(compared & older, lowered, scores)

    def _left(self, view: View) -> Tensor | float:
        """The share of its score that an entry of the region has left, float32 [B, K, T] or a number."""
        if not self.half_life:
            return self.share
        newest = view.positions.amax((1, 2), keepdim=True)
        return self.share * torch.exp2((view.positions - newest).float() / self.half_life)
