"""The one order in which scores are compared: higher first, NaN last, then the lower slot."""

import torch
from torch import Tensor

_SMALLEST = torch.iinfo(torch.int32).min


def sort_keys(scores: Tensor, candidates: Tensor) -> Tensor:
    """Int32 keys that order like float32 `scores` of the same shape; -0.0 equals 0.0.

    NaN ranks below -inf, and what is no candidate below NaN: the bit patterns under -inf are free, so neither
    can be mistaken for a number.
    """
    bits = (scores.float() + 0.0).view(torch.int32)
    keys = torch.where(bits < 0, bits ^ torch.iinfo(torch.int32).max, bits)
    return keys.masked_fill(scores.isnan(), _SMALLEST + 1).masked_fill(~candidates, _SMALLEST)


def best_first(scores: Tensor, candidates: Tensor) -> Tensor:
    """Int64 slots along the last dimension, best first, ties by the lower slot, no candidates at the end."""
    return sort_keys(scores, candidates).argsort(dim=-1, descending=True, stable=True)
