"""Evicted entries are gone."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Entries, Merger, View


@attrs.frozen
class Drop(Merger):
    """Keeps the entries of the kept slots as they are, bit for bit; padding slots are zero."""

    name: ClassVar[str] = "drop"

    def merge(self, view: View, kept: Tensor) -> Entries:
        votes = None if view.log_votes is None else _gather(view.log_votes, kept)
        return Entries(_gather(view.keys, kept), _gather(view.values, kept), votes)


def _gather(held: Tensor, kept: Tensor) -> Tensor:
    """Slots `kept` [B, K, N] of `held` [B, K, T, ...]: whole rows are moved, which `torch.gather` cannot."""
    batch, heads = kept.shape[:2]
    rows = torch.arange(batch, device=kept.device)[:, None, None]
    columns = torch.arange(heads, device=kept.device)[:, None]
    moved = held[rows, columns, kept.clamp(min=0)]
    padding = (kept < 0).reshape(kept.shape + (1,) * (held.ndim - 3))
    return moved.masked_fill_(padding, 0.0)
