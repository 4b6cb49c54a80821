"""Scores of a head to mean 0 and standard deviation 1."""

import torch
from torch import Tensor


def standardised(scores: Tensor, inside: Tensor) -> Tensor:
    """Scores [..., T] to mean 0 and population deviation 1 over the slots `inside` (bool [..., T]); zeros elsewhere."""
    count = inside.sum(-1, keepdim=True).clamp(min=1)
    mean = scores.masked_fill(~inside, 0.0).sum(-1, keepdim=True) / count
    centred = (scores - mean).masked_fill(~inside, 0.0)
    deviation = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    return centred / deviation.clamp(min=torch.finfo(torch.float32).tiny)
