"""Selector `whitelist`: the regions of the request first, then the best of the rest."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import SelectionRequest, Selector
from kvpolicy.stages.ordering import highest


@attrs.frozen
class Whitelist(Selector):
    """Keeps all entries that are in a region, whatever they score, and of the others the best.

    Whitelisting of "The Pitfalls of KV Cache Compression": kept = R and the n - |R| best others. Where the
    regions do not fit, the best of their entries stay, where the published code raises an error. The budget stays what
    it is, unlike under `protect: {regions: [...]}`, which holds more where it must. Without regions the best stay;
    NaN comes last, listed or not.
    """

    name: ClassVar[str] = "whitelist"
    reference: ClassVar[str] = "arXiv:2510.00231"

    def select(self, request: SelectionRequest) -> Tensor:
        if request.regions is None:
            return highest(request.scores, request.candidates, request.counts)
        listed = request.candidates & (request.regions > 0) & ~request.scores.isnan()
        first = torch.minimum(request.counts, listed.sum(-1))
        rest = highest(request.scores, request.candidates & ~listed, request.counts - first)
        return highest(request.scores, listed, first) | rest
