"""Attention with affine codes: products with codes · scale + minimum in which no entry is decoded.

Codes are multiplied by their scales, which costs less than many small products with scaled queries; the minima, one a
group, are a product of their own.
"""

import torch
from torch import Tensor

from kvpolicy_plugins.codecs.shared.packing import unpack


def channel_logits(queries: Tensor, codes: Tensor, scales: Tensor, minima: Tensor, bits: int) -> Tensor:
    """q·k [B, K, n, T] of queries [B, K, n, D] with what `affine.quantise_channels` gave."""
    exact = queries.dtype
    scaled = unpack(codes, bits, scales.shape[-1]).to(exact).mul_(scales[..., None, :].to(exact))
    logits = queries @ scaled.flatten(2, 3).transpose(-1, -2)
    lowest = queries @ minima.to(exact).transpose(-1, -2)  # [B, K, n, groups]
    logits.unflatten(-1, (lowest.shape[-1], -1)).add_(lowest[..., None])
    return logits


def token_logits(queries: Tensor, codes: Tensor, scales: Tensor, minima: Tensor, bits: int) -> Tensor:
    """q·k [B, K, n, T] of queries [B, K, n, D] with what `affine.quantise_tokens` gave."""
    scaled = _scaled(codes, scales, queries.shape[-1], bits, queries.dtype)
    logits = queries @ scaled.transpose(-1, -2)
    sums = queries.unflatten(-1, (scales.shape[-1], -1)).sum(-1)  # [B, K, n, groups of channels]
    return logits.add_(sums @ minima.to(queries.dtype).transpose(-1, -2))


def token_sum(weights: Tensor, codes: Tensor, scales: Tensor, minima: Tensor, dim: int, bits: int) -> Tensor:
    """Sums [B, K, n, D] of what `affine.quantise_tokens` gave, weighted by [B, K, n, T]."""
    total = weights @ _scaled(codes, scales, dim, bits, weights.dtype)
    lowest = weights @ minima.to(weights.dtype)  # [B, K, n, groups of channels]
    total.unflatten(-1, (lowest.shape[-1], -1)).add_(lowest[..., None])
    return total


def _scaled(codes: Tensor, scales: Tensor, dim: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Codes times scales, [B, K, T, D]."""
    groups = unpack(codes, bits, dim).to(dtype).unflatten(-1, (scales.shape[-1], -1))
    scaled: Tensor = groups.mul_(scales[..., None].to(dtype)).flatten(-2)
    return scaled
