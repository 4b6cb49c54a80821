"""Selector `topk`: the best candidates of each head."""

from typing import ClassVar

import attrs
from torch import Tensor

from kvpolicy.stages import Selector
from kvpolicy.stages.ordering import highest


@attrs.frozen
class TopK(Selector):
    """Each head keeps its highest scores. NaN ranks last, -0.0 equals 0.0, ties go to the earlier entry."""

    name: ClassVar[str] = "topk"
    best: ClassVar[bool] = True

    def select(self, scores: Tensor, candidates: Tensor, counts: Tensor) -> Tensor:
        return highest(scores, candidates, counts)
