"""Weighted averages of kept entries and the evicted entries that are merged into them."""

from functools import cached_property

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Entries, View
from kvpolicy.stages.slots import gather
from kvpolicy_plugins.mergers.shared.merge_groups import count_by_target, kept_index, sum_by_target, to_float


@attrs.frozen(eq=False)
class Assignment:
    """Every merged entry goes to one kept entry."""

    kept: Tensor  # [B, K, N] int64, padded with -1
    merged: Tensor  # [B, K, T] bool; False in heads without kept entries
    target: Tensor  # [B, K, T] int64, index in `kept`

    @cached_property
    def merged_counts(self) -> Tensor:
        """[B, K, N] float32: how many entries are merged into each kept one."""
        return self.total(self.merged.float())

    def total(self, weights: Tensor) -> Tensor:
        """[B, K, N]: sum of the weights [B, K, T] of the entries merged into each kept one."""
        if self.kept.shape[-1] == 0:
            return weights.new_zeros(self.kept.shape)
        return count_by_target(weights.masked_fill(~self.merged, 0.0), self.target, self.kept.shape[-1])

    def blend(
        self, entries: Tensor, weights: Tensor, own_weight: float | Tensor = 1.0, divisor: Tensor | None = None
    ) -> Tensor:
        """Weighted means, (own_weight·x_j + Σ w_i·x_i) / divisor_j; bit for bit x_j where nothing is merged.

        Args:
            entries: [B, K, T, D], keys or values.
            weights: w, [B, K, T] float32 or float64; those of merged entries count.
            own_weight: of the kept entry itself, [B, K, N] or the same for all.
            divisor: [B, K, N]; by default the sum of the weights.

        Returns:
            [B, K, N, D] in the dtype of `entries`.
        """
        unmerged = gather(entries, self.kept)
        if self.kept.shape[-1] == 0:
            return unmerged
        weights = weights.masked_fill(~self.merged, 0.0)
        sums = sum_by_target(weights, entries, self.target, self.kept.shape[-1])
        share = own_weight[..., None] if isinstance(own_weight, Tensor) else own_weight
        total_weight = own_weight + self.total(weights) if divisor is None else divisor
        mean = (share * unmerged.to(sums.dtype) + sums) / total_weight[..., None]
        return torch.where(self.merged_counts[..., None] > 0, mean.to(entries.dtype), unmerged)


def next_kept(view: View, kept: Tensor) -> Tensor:
    """[B, K, T] int64: index in `kept` [B, K, N] of the first kept slot after each slot.

    For slots after the last kept one it is the number of kept slots of the head.
    """
    is_kept = kept_index(kept, view.positions.shape[-1]) >= 0
    return is_kept.cumsum(-1)


def kept_entries(view: View, kept: Tensor, *, keys: Tensor | None = None, values: Tensor | None = None) -> Entries:
    """The kept entries with new keys and values [B, K, N, D] (None = unchanged), and which of them changed."""
    old_keys, old_values = gather(view.keys, kept), gather(view.values, kept)
    keys, values = old_keys if keys is None else keys, old_values if values is None else values
    changed = (keys != old_keys).any(-1) | (values != old_values).any(-1)
    return Entries(keys, values, changed=changed)


def norms_of(vectors: Tensor) -> Tensor:
    """L2 norms of [..., D], float32 or float64."""
    norms: Tensor = torch.linalg.vector_norm(to_float(vectors), dim=-1)
    return norms
