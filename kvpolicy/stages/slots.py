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
    return taken.masked_fill_(empty, 0)  # nobody else has it


def take(entries: Tensor, slots: Tensor) -> Tensor:
    """The entries at valid slots (no -1): [B, K, T, ...] and [B, K, N] to [B, K, N, ...]."""
    if entries.ndim == 3:
        return entries.gather(2, slots)
    if _are_vectors(entries) and slots.shape[:2] == entries.shape[:2]:
        # Whole vectors are copied at once, which on a CPU takes a fifth of the time of picking them by three indices.
        rows, heads, count, dim = entries.shape
        between = entries.stride(1) // dim  # vectors from one head to the next
        span = (rows * heads - 1) * between + count
        vectors = entries.as_strided((span, dim), (dim, 1), entries.storage_offset())
        first = torch.arange(rows * heads, device=slots.device).mul_(between).view(rows, heads, 1)
        return vectors.index_select(0, (slots + first).flatten()).view(*slots.shape, dim)
    batch = torch.arange(slots.shape[0], device=slots.device)[:, None, None]
    kv_heads = torch.arange(slots.shape[1], device=slots.device)[None, :, None]
    return entries[batch, kv_heads, slots]


def _are_vectors(entries: Tensor) -> bool:
    """Whether [B, K, T, D] are vectors side by side, those of all heads equally far from those of the next."""
    if entries.ndim != 4 or not entries.numel():
        return False
    row, head, *inner = entries.stride()
    return inner == [entries.shape[3], 1] and head % entries.shape[3] == 0 and row == entries.shape[1] * head
