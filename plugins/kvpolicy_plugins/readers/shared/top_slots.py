"""Top-k slots with a defined order of ties, without a full sort."""

import torch
from torch import Tensor

from kvpolicy.stages.ordering import sort_keys

_LAST = torch.iinfo(torch.int32).max


def top_slots(scores: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The first `count` slots of `best_first`, or all if there are fewer: int64 [..., count].

    The slot is part of the compared key, because `topk` may return equal keys in any order.
    """
    slots = torch.arange(scores.shape[-1], device=scores.device)
    compared = (sort_keys(scores, candidates).long() << 32) | (_LAST - slots)
    return compared.topk(min(count, scores.shape[-1])).indices
