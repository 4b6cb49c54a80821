"""Means of the entries that are merged into each kept one, weighted by the mass that attention gives them."""

from typing import Self

import attrs
import torch
from torch import Tensor

from kvpolicy_plugins.mergers.shared.merge_groups import Groups, logsumexp_by_target, sum_by_target


@attrs.frozen(eq=False)
class GroupMeans:
    """Means of the members of groups, weighted by mass, or by votes in groups that have no mass."""

    keys: Tensor  # [B, K, N, D]
    values: Tensor  # [B, K, N, Dv]
    weights: Tensor  # [B, K, T], of the members; they sum to 1 in each group
    log_mass: Tensor  # [B, K, N], ln of the sum of the masses; of the votes where `by_votes`
    by_votes: Tensor  # bool [B, K, N], groups without mass

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, log_mass: Tensor, log_votes: Tensor, groups: Groups) -> Self:
        """In the dtype of the masses.

        Args:
            keys: [B, K, T, D].
            values: [B, K, T, Dv].
            log_mass: [B, K, T] float32 or float64, -inf for no mass and for what is no member.
            log_votes: [B, K, T], of the same dtype, -inf for what is no member.
            groups: of N kept entries.
        """
        target, count = groups.target, groups.merged.shape[-1]
        by_votes = logsumexp_by_target(log_mass, target, count) == -torch.inf
        log_mass = torch.where(by_votes.gather(-1, target), log_votes, log_mass)
        total = logsumexp_by_target(log_mass, target, count)
        weights = (log_mass - total.gather(-1, target)).exp().masked_fill(~groups.member, 0.0)
        return cls(
            keys=sum_by_target(weights, keys, target, count),
            values=sum_by_target(weights, values, target, count),
            weights=weights,
            log_mass=total,
            by_votes=by_votes,
        )
