"""The best few of many scores, without putting all of them in order."""

import torch
from torch import Tensor

from kvpolicy.stages.ordering import sort_keys

_LAST = torch.iinfo(torch.int32).max


def leading(scores: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The first `count` slots of `best_first`, or all if there are fewer: int64 [..., count].

    A slot is part of what is compared, so that no two are equal: a device may choose any of equal ones otherwise.
    """
    slots = torch.arange(scores.shape[-1], device=scores.device)
    compared = (sort_keys(scores, candidates).long() << 32) | (_LAST - slots)
    return compared.topk(min(count, scores.shape[-1])).indices
