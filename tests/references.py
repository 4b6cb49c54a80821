"""Slow and obvious forms of what the plugins compute, in float64."""

import torch
from torch import Tensor


def causal_attention(queries: Tensor, keys: Tensor, scaling: float | None = None) -> Tensor:
    """Probabilities [B, H, Q, T] of the last Q tokens of T."""
    keys = keys.double().repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    factor = keys.shape[-1] ** -0.5 if scaling is None else scaling
    logits = factor * queries.double() @ keys.transpose(-1, -2)
    later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1 + logits.shape[-1] - logits.shape[-2])
    return logits.masked_fill(later, -torch.inf).softmax(-1)


def mass(probabilities: Tensor) -> Tensor:
    """What each entry receives: [B, H, Q, T] to float32 [B, H, T]."""
    return probabilities.sum(2).float()
