"""Selector `topk`: the best candidates of each head."""

from typing import ClassVar

import attrs
from torch import Tensor

from kvpolicy.stages import SelectionRequest, Selector
from kvpolicy.stages.ordering import highest


@attrs.frozen
class TopK(Selector):
    """Each head keeps its highest scores. NaN ranks last, -0.0 equals 0.0, ties go to the earlier entry."""

    name: ClassVar[str] = "topk"
    layers_as_rows: ClassVar[bool] = True
    best: ClassVar[bool] = True

    def select(self, request: SelectionRequest) -> Tensor:
        return highest(request.scores, request.candidates, request.counts)
