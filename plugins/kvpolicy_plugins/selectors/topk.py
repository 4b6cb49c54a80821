"""The best of each head."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Selector
from kvpolicy_plugins.ranking import best_first


@attrs.frozen
class TopK(Selector):
    """Each head keeps its highest scores. NaN ranks last, -0.0 equals 0.0, ties go to the earlier one."""

    name: ClassVar[str] = "topk"
    best: ClassVar[bool] = True

    def select(self, scores: Tensor, candidates: Tensor, counts: Tensor) -> Tensor:
        order = best_first(scores, candidates)
        chosen = torch.arange(order.shape[-1], device=order.device) < counts[..., None]
        return torch.zeros_like(candidates).scatter_(-1, order, chosen) & candidates
