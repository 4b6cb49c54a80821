"""The order of scores: higher first, NaN last, ties by the lower slot."""

import torch
from torch import Tensor

_SMALLEST = torch.iinfo(torch.int32).min
_LARGEST = torch.iinfo(torch.int32).max


def sort_keys(scores: Tensor, candidates: Tensor) -> Tensor:
    """Int32 keys that order like float32 `scores` of the same shape; -0.0 equals 0.0.

    NaN ranks below -inf, and slots that are not candidates below NaN. Their keys are bit patterns below that of
    -inf, which no number has.
    """
    bits = (scores.float() + 0.0).view(torch.int32)
    keys = torch.where(bits < 0, bits ^ torch.iinfo(torch.int32).max, bits)
    return keys.masked_fill(scores.isnan(), _SMALLEST + 1).masked_fill(~candidates, _SMALLEST)


def best_first(scores: Tensor, candidates: Tensor) -> Tensor:
    """Int64 slots along the last dimension, best first, ties by the lower slot; slots that are not candidates last."""
    return sort_keys(scores, candidates).argsort(dim=-1, descending=True, stable=True)


def highest(scores: Tensor, candidates: Tensor, counts: Tensor) -> Tensor:
    """Bool like `candidates` [..., T]: the first `counts` [...] of each row in the order of `best_first`.

    These are the slots above the lowest kept score, and of those that equal it the lowest slots.
    """
    keys = sort_keys(scores, candidates)
    last = _last_kept(keys, candidates, counts[..., None])
    above, equal = candidates & (keys > last), candidates & (keys == last)
    missing = counts[..., None] - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= missing))


def _last_kept(keys: Tensor, candidates: Tensor, counts: Tensor) -> Tensor:
    """The `counts`-th highest key [..., 1] of the candidates; where the count is 0, one that no key exceeds."""
    evicted = (candidates.sum(-1, keepdim=True) - counts).clamp(min=0)
    rank = (counts - 1).clamp(0, keys.shape[-1] - 1)
    if keys.device.type != "cpu":  # reading the counts would synchronise the device
        return keys.sort(dim=-1, descending=True).values.gather(-1, rank)
    most_kept, most_evicted = int(rank.max()) + 1, int(evicted.max())
    if most_kept <= most_evicted:
        return keys.topk(most_kept, dim=-1).values.gather(-1, rank)
    width = min(most_evicted + 1, keys.shape[-1])
    lowest = keys.masked_fill(~candidates, _LARGEST).topk(width, dim=-1, largest=False).values
    return lowest.gather(-1, evicted.clamp(max=width - 1))
