"""Which evicted entries are merged into which kept ones, and the averages that come of it."""

from functools import cached_property

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Entries, View
from kvpolicy.stages.slots import gather
from kvpolicy_plugins.merging import count_by_target, kept_index, statistics_of, sum_by_target


@attrs.frozen(eq=False)
class Assignment:
    """Every merged entry goes to one kept entry."""

    kept: Tensor  # [B, K, N] int64, -1 behind a head's last one
    merged: Tensor  # [B, K, T] bool; none in a head that keeps nothing
    target: Tensor  # [B, K, T] int64, place in `kept`

    @cached_property
    def arrivals(self) -> Tensor:
        """[B, K, N] float32: how many entries each kept one takes in."""
        return self.total(self.merged.float())

    def total(self, weights: Tensor) -> Tensor:
        """[B, K, N]: sum of the weights [B, K, T] of what each kept entry takes in."""
        if self.kept.shape[-1] == 0:
            return weights.new_zeros(self.kept.shape)
        return count_by_target(weights.masked_fill(~self.merged, 0.0), self.target, self.kept.shape[-1])

    def blend(
        self, entries: Tensor, weights: Tensor, own: float | Tensor = 1.0, divisor: Tensor | None = None
    ) -> Tensor:
        """Weighted means, (own·x_j + Σ w_i·x_i) / divisor_j; bit for bit x_j where nothing is taken in.

        Args:
            entries: [B, K, T, D], keys or values.
            weights: w, [B, K, T] float32 or float64; those of merged entries count.
            own: weight of the kept entry itself, [B, K, N] or the same for all.
            divisor: [B, K, N]; by default the sum of the weights.

        Returns:
            [B, K, N, D] in the dtype of `entries`.
        """
        before = gather(entries, self.kept)
        if self.kept.shape[-1] == 0:
            return before
        weights = weights.masked_fill(~self.merged, 0.0)
        sums = sum_by_target(weights, entries, self.target, self.kept.shape[-1])
        share = own[..., None] if isinstance(own, Tensor) else own
        by = own + self.total(weights) if divisor is None else divisor
        mean = (share * before.to(sums.dtype) + sums) / by[..., None]
        return torch.where(self.arrivals[..., None] > 0, mean.to(entries.dtype), before)


def following(view: View, kept: Tensor) -> Tensor:
    """[B, K, T] int64: the place in `kept` [B, K, N] of the first kept slot behind each slot; N' if none is left.

    N' is how many slots the head keeps.
    """
    is_kept = kept_index(kept, view.positions.shape[-1]) >= 0
    return is_kept.cumsum(-1)


def entries_of(view: View, kept: Tensor, *, keys: Tensor | None = None, values: Tensor | None = None) -> Entries:
    """The kept entries with new keys and values [B, K, N, D]; None = as they are. Says which of them differ."""
    old_keys, old_values = gather(view.keys, kept), gather(view.values, kept)
    keys, values = old_keys if keys is None else keys, old_values if values is None else values
    changed = (keys != old_keys).any(-1) | (values != old_values).any(-1)
    return Entries(keys, values, changed=changed)


def norms_of(vectors: Tensor) -> Tensor:
    """L2 norms of [..., D], float32 or float64."""
    norms: Tensor = torch.linalg.vector_norm(statistics_of(vectors), dim=-1)
    return norms
