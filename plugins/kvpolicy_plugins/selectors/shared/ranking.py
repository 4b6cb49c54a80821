"""Ranks of candidates by two numbers: first the group that they are in, then their scores."""

import torch
from torch import Tensor

from kvpolicy.stages.ordering import best_first


def group_ranks(groups: Tensor, scores: Tensor, candidates: Tensor) -> Tensor:
    """The place of every slot in the order of groups, lowest first, and of scores within a group; int64 [B, K, T].

    Args:
        groups: int64 [B, K, T], the group of each slot.
        scores: float32 [B, K, T]; higher first, NaN last, ties go to the lower slot.
        candidates: bool [B, K, T]; all other slots come last.
    """
    by_score = best_first(scores, candidates)
    last = torch.iinfo(torch.int64).max
    by_group = groups.masked_fill(~candidates, last).gather(-1, by_score).argsort(dim=-1, stable=True)
    return by_score.gather(-1, by_group).argsort(dim=-1)
