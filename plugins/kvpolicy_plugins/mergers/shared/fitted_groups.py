"""A group of entries as one entry that gives the observation window what the group gave."""

import torch
from torch import Tensor

from kvpolicy_plugins.mergers.shared.group_means import GroupMeans
from kvpolicy_plugins.mergers.shared.merge_groups import Groups, logsumexp_by_target
from kvpolicy_plugins.mergers.shared.window_logits import WindowLogits, softmax
from kvpolicy_plugins.shared.least_squares import ridge_towards, square_norm


def fit(
    keys: Tensor, values: Tensor, log_votes: Tensor, groups: Groups, complete: Tensor, window: WindowLogits
) -> tuple[Tensor, Tensor, Tensor]:
    """One entry for each group, in the dtype of the window's logits.

    The mass of a group is log-sum-exp of its members' logits, a convex function of the query; it is replaced by
    a linear one, q·k_r + b_r, that has the same mean over the queries, weighted by the mass they give the group.

    Args:
        keys: [B, K, T, D].
        values: [B, K, T, Dv].
        log_votes: [B, K, T].
        groups: of N kept entries.
        complete: bool [B, K, W, N], queries that count for a group because they see all of it.
        window: the queries.

    Returns:
        Keys [B, K, N, D], values [B, K, N, Dv] and log-votes [B, K, N].
    """
    target, count = groups.target, groups.merged.shape[-1]
    total = window.log_total
    is_counted = complete.gather(-1, target[:, :, None].expand(-1, -1, complete.shape[2], -1))
    is_counted &= groups.member[:, :, None]
    share = (window.logits - total).masked_fill_(~is_counted[:, :, None], -torch.inf)
    votes = log_votes.to(share.dtype).masked_fill(~groups.member, -torch.inf)
    means = GroupMeans.of(keys, values, share.flatten(2, 3).logsumexp(2), votes, groups)
    group_share = logsumexp_by_target(share, target, count)  # [B, K, G, W, N]
    query_weights = (group_share - means.log_mass[:, :, None, None]).exp_()
    missing = group_share + total - window.queries @ means.keys[:, :, None].transpose(-1, -2)
    bias = (query_weights * missing).masked_fill_(group_share == -torch.inf, 0.0).flatten(2, 3).sum(2)
    return means.keys, means.values, torch.where(means.by_votes, means.log_mass, bias)


def solved_values(
    values: Tensor,
    fitted: tuple[Tensor, Tensor, Tensor],
    groups: Groups,
    complete: Tensor,
    window: WindowLogits,
    ridge: float,
) -> Tensor:
    """Values [B, K, N, Dv], float64, with which kept entries give the window the output over all: `WindowFit`, step 5.

    Args:
        values: [B, K, T, Dv].
        fitted: keys, values and log-votes of kept entries, as `fit` gives them.
        groups: of N kept entries; values change of those that others are merged into.
        complete: bool [B, K, W, N], queries that count for a group because they see all of it.
        window: the queries.
        ridge: relative to the square of the largest singular value.
    """
    keys, means, log_votes = fitted
    counted = complete.gather(-1, groups.target[:, :, None].expand(-1, -1, complete.shape[2], -1))
    counted &= groups.member[:, :, None]
    before = softmax(window.logits.masked_fill(~counted[:, :, None], -torch.inf).flatten(2, 3).double())
    logits = window.queries @ keys[:, :, None].mT + log_votes[:, :, None, None]
    after = softmax(logits.masked_fill(~complete[:, :, None], -torch.inf).flatten(2, 3).double())
    free, prior = after.masked_fill(~groups.merged[:, :, None], 0.0), means.double()
    return ridge_towards(free, before @ values.double() - (after - free) @ prior, prior, ridge, square_norm(free))
