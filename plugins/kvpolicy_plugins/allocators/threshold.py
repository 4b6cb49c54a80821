"""Allocator `threshold`: of what the budget allows, only scores that reach a value stay (DMS)."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import AllocationRequest, HeadAllocator, Number, parameter


@attrs.frozen
class Threshold(HeadAllocator):
    """Each head keeps its candidates whose score is at least `value`; where these exceed the budget, the best of them.

    Eviction by a threshold, as DMS (section 3) and kvpress's DMSPress do it: how much is kept follows from the input,
    and heads differ. With f = how many of the layer's best candidates, as many as its budget, each head owns,

        counts = min(f, number of the head's candidates with score >= value).

    The delay window of DMS, whose entries are never evicted, is `protect: {recent: 128}`. The budget is a cap: nothing
    is evicted before it is exceeded, where DMS evicts each entry as it leaves the window. An entry is scored anew in
    every compression; DMS decides once, which is the same for scorers of single entries (`key_norm`). A threshold
    means something for one scorer on one model only. A layer that fits its budget keeps everything; a candidate whose
    score is NaN is below every value.
    """

    name: ClassVar[str] = "threshold"
    reference: ClassVar[str] = "arXiv:2506.05345"
    exact: ClassVar[bool] = False

    value: float = parameter(Number(), help="the lowest weighted score that stays")

    @property
    def reads_scores(self) -> bool:
        return True

    def allocate(self, request: AllocationRequest) -> Tensor:
        layers = zip(request.scores, request.candidates, strict=True)
        reached = torch.stack([((scores >= self.value) & candidates).sum(-1) for scores, candidates in layers])
        fits = request.total >= request.room.sum(-1)
        return request.room.where(fits[..., None], request.won(request.total).long().minimum(reached))
