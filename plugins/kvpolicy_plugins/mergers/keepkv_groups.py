"""What KeepKV merges a group of entries into: weighted means, and the changes that give them the mass of the group."""

import attrs
import torch
from torch import Tensor

from kvpolicy_plugins.mergers.shared.group_means import GroupMeans
from kvpolicy_plugins.mergers.shared.merge_groups import Groups, count_by_target, logsumexp_by_target

_RCOND = 1e-4  # singular values below this fraction of the largest count as zero


@attrs.frozen(eq=False)
class ScoredGroups:
    """Means of the members of groups, weighted by p·s, and their sums: votes P and mass W."""

    keys: Tensor  # [B, K, N, D]
    values: Tensor  # [B, K, N, Dv]
    log_votes: Tensor  # [B, K, N], ln P
    log_mass: Tensor  # [B, K, N], ln W
    mean_log_score: Tensor  # [B, K, N], mean of ln s

    @property
    def log_score(self) -> Tensor:
        """Ln(W/P) [B, K, N]: the logit that a merged entry must have for its mass to be W."""
        return self.log_mass - self.log_votes

    @property
    def gap(self) -> Tensor:
        """[B, K, N]: how far the logit of the mean key lies above that; a Kullback-Leibler divergence, never < 0."""
        return self.mean_log_score - self.log_score

    @property
    def scale(self) -> Tensor:
        """The factor c [B, K, N] on the mean key (eq. 7); singular, of either sign, unless logits are positive."""
        return self.log_score / self.mean_log_score

    def additive_keys(self, queries: Tensor, scaling: float) -> Tensor:
        """Mean keys [B, K, N, D], with the smallest change that gives the query [B, K, D] the exact logit."""
        square = queries.square().sum(-1, keepdim=True)
        direction = queries / square.clamp(min=torch.finfo(queries.dtype).tiny)  # a query of 0 changes nothing
        return self.keys - (self.gap / scaling)[..., None] * direction[:, :, None]

    def fitted_keys(self, queries: Tensor, log_scores: Tensor, scaling: float) -> Tensor:
        """Mean keys [B, K, N, D], changed as little as gives `queries` [B, K, G, D] the `log_scores` [B, K, G, N]."""
        scaled = queries * scaling
        missing = log_scores - scaled @ self.keys.transpose(-1, -2)
        missing = missing.masked_fill(~missing.isfinite(), 0.0)
        inverse: Tensor = torch.linalg.pinv(scaled, rtol=_RCOND)
        return self.keys + (inverse @ missing).transpose(-1, -2)


def fold(keys: Tensor, values: Tensor, log_scores: Tensor, log_votes: Tensor, groups: Groups) -> ScoredGroups:
    """Means and sums of groups; groups in which all scores are 0 are weighted by votes alone.

    Args:
        keys: [B, K, T, D].
        values: [B, K, T, Dv].
        log_scores: [B, K, T] float32 or float64, ln s.
        log_votes: [B, K, T], of the same dtype.
        groups: of N kept entries.
    """
    target, count = groups.target, groups.merged.shape[-1]
    votes = log_votes.masked_fill(~groups.member, -torch.inf)
    scores = log_scores.masked_fill(~groups.member, 0.0)
    means = GroupMeans.of(keys, values, votes + scores, votes, groups)
    scores = scores.masked_fill(means.by_votes.gather(-1, target), 0.0)
    return ScoredGroups(
        keys=means.keys,
        values=means.values,
        log_votes=logsumexp_by_target(votes, target, count),
        log_mass=means.log_mass,
        mean_log_score=count_by_target((means.weights * scores).masked_fill(means.weights == 0, 0.0), target, count),
    )
