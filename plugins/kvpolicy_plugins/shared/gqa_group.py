"""Reduction of a GQA group to one value per KV head."""

from torch import Tensor

from kvpolicy.stages import Choice

GROUP = Choice(("mean", "max", "sum"))


def reduce_group(grouped: Tensor, how: str) -> Tensor:
    """[B, K, G, ...] to [B, K, 1, ...]; `rms` is the root of the mean square. Applying it twice changes nothing."""
    if how == "rms":  # of what is not negative
        return grouped.square().mean(2, keepdim=True).sqrt()
    if how == "max":
        return grouped.amax(2, keepdim=True)
    return grouped.mean(2, keepdim=True) if how == "mean" else grouped.sum(2, keepdim=True)
