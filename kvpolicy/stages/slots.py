"""Conversions between masks over slots, keep indices and entries."""

import torch
from torch import Tensor


def indices_of(mask: Tensor, width: int | None = None) -> Tensor:
    """Keep indices of a mask: bool [B, K, T] to int64 [B, K, N], ascending, padded with -1.

    N is `width`, the largest count of any head; without it the host waits for the device to compute it.
    """
    if width is None:
        width = int(mask.sum(-1).max()) if mask.numel() else 0
    slots = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
    columns = (mask.cumsum(-1) - 1).where(mask, width)  # an extra last column for slots that are not kept
    indices = slots.new_full((*mask.shape[:-1], width + 1), -1)
    return indices.scatter_(-1, columns, slots)[..., :width]


def by_position(positions: Tensor) -> Tensor:
    """All slots, int64 [B, K, T], in ascending order of `positions` [B, K, T]; empty ones, -1, last."""
    return positions.masked_fill(positions < 0, torch.iinfo(positions.dtype).max).argsort(dim=-1, stable=True)


def gather(entries: Tensor, kept: Tensor) -> Tensor:
    """The entries at the keep indices: [B, K, T, ...] and [B, K, N] to [B, K, N, ...]; zeros where kept is -1."""
    taken = take(entries, kept.clamp(min=0))
    empty = (kept < 0).reshape(*kept.shape, *[1] * (taken.ndim - 3))
    return taken.masked_fill(empty, 0)


def take(entries: Tensor, slots: Tensor) -> Tensor:
    """The entries at valid slots (no -1): [B, K, T, ...] and [B, K, N] to [B, K, N, ...]."""
    batch, heads = slots.shape[:2]
    rows = torch.arange(batch, device=slots.device)[:, None, None]
    kv_heads = torch.arange(heads, device=slots.device)[None, :, None]
    return entries[rows, kv_heads, slots]
