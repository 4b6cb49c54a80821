"""Merger `keepkv`: merges evicted entries so that the output of the next query does not change."""

from collections.abc import Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Choice, Entries, Merger, Needs, Number, QueryLogits, State, View, parameter
from kvpolicy.stages.slots import gather
from kvpolicy_plugins.mergers.shared.few_groups import FewGroups
from kvpolicy_plugins.mergers.shared.merge_groups import (
    Groups,
    count_by_target,
    evicted_of,
    groups_of,
    logsumexp_by_target,
    nearest,
    sum_by_target,
    to_float,
)
from kvpolicy_plugins.mergers.shared.score_estimates import Estimate, MovingAverage, ScoreFold, WindowMean
from kvpolicy_plugins.shared.limits import QUERIES

LOSSLESS = ("additive", "bias")
_RCOND = 1e-4  # singular values below this fraction of the largest count as zero


@attrs.frozen(eq=False)
class GroupMeans:
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


def fold(keys: Tensor, values: Tensor, log_scores: Tensor, log_votes: Tensor, groups: Groups) -> GroupMeans:
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
    is_zero = logsumexp_by_target(votes + log_scores.masked_fill(~groups.member, 0.0), target, count) == -torch.inf
    scores = log_scores.masked_fill(~groups.member | is_zero.gather(-1, target), 0.0)
    log_mass = logsumexp_by_target(votes + scores, target, count)
    weights = (votes + scores - log_mass.gather(-1, target)).exp().masked_fill(~groups.member, 0.0)
    return GroupMeans(
        keys=sum_by_target(weights, keys, target, count),
        values=sum_by_target(weights, values, target, count),
        log_votes=logsumexp_by_target(votes, target, count),
        log_mass=log_mass,
        mean_log_score=count_by_target((weights * scores).masked_fill(weights == 0, 0.0), target, count),
    )


@attrs.frozen
class KeepKV(Merger):
    """Merges evicted entries into the most similar kept ones and preserves the output, KeepKV (section 3).

    1. an evicted entry goes to the kept entry with the most similar key, or is dropped below `threshold`;
    2. s = e^(raw logit) is estimated from the queries seen so far (eq. 8), as a mean over a GQA group;
    3. votes p_r = P = Σ p_i, v_r = Σ p_i·s_i·v_i / W with W = Σ p_i·s_i;
    4. k_r = c·k̄ with k̄ = Σ p_i·s_i·k_i / W and c = ln(W/P) / mean of ln s (eq. 7), which preserves the output
       of a query with these scores. Where c is not from 0 to `scale_max`, `fallback` does the same with a step along
       the newest query (`additive`), or with fewer votes than P (`bias`).

    `key: mean` (c = 1) with `estimate: window` is the released code. A group can be exact for one query
    vector only: `gqa: lstsq` gives the newest query of each of the G heads its mass, though not its value. A cache
    per query head (`expand`), which would be exact, is not implemented: it is G times as large.
    """

    name: ClassVar[str] = "keepkv"
    reference: ClassVar[str] = "arXiv:2504.09936"
    layers_as_rows: ClassVar[bool] = True
    votes: ClassVar[bool] = True

    threshold: float = parameter(
        Number(minimum=-1, maximum=2), 0.8, help="least cosine similarity of keys for a merge; above 1 = no merges"
    )
    estimate: str = parameter(
        Choice(("ema", "window")), "ema", help="scores: moving average, or mean over the last `window` queries"
    )
    alpha: float = parameter(Number(minimum=0, maximum=1), 0.9, help="factor on the moving average at each query")
    window: int = parameter(QUERIES, 32, help="how many of the newest queries of a forward are used")
    key: str = parameter(
        Choice(("scale", *LOSSLESS, "mean")), "scale", help="how a merged key preserves its mass; `mean` does not"
    )
    scale_max: float = parameter(Number(above=0, maximum=1e9), 1.0, help="largest factor that `scale` puts on a key")
    fallback: str = parameter(Choice(LOSSLESS), "additive", help="used by `scale` where the factor is out of bounds")
    gqa: str = parameter(
        Choice(("shared", "lstsq")), "shared", help="one score for a GQA group, or keys fitted to each query head"
    )

    def __attrs_post_init__(self) -> None:
        if self.alpha == 1:
            raise ParameterError(f"alpha: must be less than 1: {self.alpha:g}")
        if self.gqa == "lstsq" and self.key != "additive":
            raise ParameterError(f"gqa: must be shared unless the key is additive: {self.gqa}")

    def needs(self) -> Needs:
        asks = self.key == "additive" or (self.key, self.fallback) == ("scale", "additive")
        return Needs(queries=int(asks), forward_queries=self.window)

    def slot_state(self) -> tuple[State, ...]:
        return self._estimate.states()

    def observe_forward(self, query_logits: QueryLogits, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self._estimate.observe_forward(query_logits, state)

    @property
    def _estimate(self) -> Estimate:
        return MovingAverage(self.alpha, self.window) if self.estimate == "ema" else WindowMean(self.window)

    def merge(self, view: View, kept: Tensor) -> Entries:
        evicted = evicted_of(view, kept)
        similarity, index = nearest(view.keys, kept, evicted, most=view.most_evicted)
        joins = evicted & self._mergeable(similarity)
        few = FewGroups.of(view, kept, joins, index)
        if few is None:
            return self.merge_groups(view, kept, groups_of(kept, joins, index))
        return few.whole(self.merge_groups(few.view, few.kept, few.groups), view, kept, log_votes_of(view))

    def _mergeable(self, similarity: Tensor) -> Tensor:
        """Whether entries merge. Rounding may put opposite keys below -1; in heads without kept entries it is -inf."""
        return similarity > -torch.inf if self.threshold == -1 else similarity >= self.threshold

    def merge_groups(self, view: View, kept: Tensor, groups: Groups) -> Entries:
        """The entries [B, K, N] of given groups; groups of one are unchanged, bit for bit."""
        plain = gather(view.keys, kept), gather(view.values, kept)
        log_votes = log_votes_of(view)
        if not kept.shape[-1]:
            return Entries(*plain, gather(log_votes, kept))
        keys, values, new_votes = self._merged(view, groups, log_votes)
        state = self._estimate.merged(view.slot_state, kept, ScoreFold(groups, log_votes, new_votes))
        is_merged = groups.merged
        return Entries(
            keys=torch.where(is_merged[..., None], keys.to(plain[0].dtype), plain[0]),
            values=torch.where(is_merged[..., None], values.to(plain[1].dtype), plain[1]),
            log_votes=torch.where(is_merged, new_votes.to(log_votes.dtype), gather(log_votes, kept)),
            changed=is_merged,
            slot_state={
                name: torch.where(
                    is_merged, new_state.to(view.slot_state[name].dtype), gather(view.slot_state[name], kept)
                )
                for name, new_state in state.items()
            },
        )

    def _merged(self, view: View, groups: Groups, log_votes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and log-votes of the groups; undefined for groups of one."""
        precise = to_float(view.keys).dtype
        scores = self._estimate.log_scores(view.slot_state).to(precise)
        folded = fold(view.keys, view.values, scores, log_votes.to(precise), groups)
        if self.key != "scale":
            keys, votes = self._corrected(self.key, folded, view, groups)
            return keys, folded.values, votes
        scale = folded.scale
        fits = (scale > 0) & (scale <= self.scale_max)
        keys, votes = self._corrected(self.fallback, folded, view, groups)
        keys = torch.where(fits[..., None], scale[..., None] * folded.keys, keys)
        return keys, folded.values, torch.where(fits, folded.log_votes, votes)

    def _corrected(self, key: str, folded: GroupMeans, view: View, groups: Groups) -> tuple[Tensor, Tensor]:
        """Keys and log-votes of the groups by the rule `key`."""
        if key == "mean":
            return folded.keys, folded.log_votes
        if key == "bias":
            return folded.keys, folded.log_votes - folded.gap
        queries = newest_queries(view)
        if self.gqa == "shared":
            return folded.additive_keys(queries.mean(2), view.scaling), folded.log_votes
        log_mass = self._log_mass(queries, view, groups)
        return folded.fitted_keys(queries, log_mass - folded.log_votes[:, :, None], view.scaling), folded.log_votes

    def _log_mass(self, queries: Tensor, view: View, groups: Groups) -> Tensor:
        """Ln W [B, K, G, N] that each of the queries gives the groups."""
        logits = (queries * view.scaling) @ view.keys.to(queries.dtype).transpose(-1, -2)
        if view.log_votes is not None:
            logits = logits + view.log_votes[:, :, None]
        logits = logits.masked_fill(~groups.member[:, :, None], -torch.inf)
        return logsumexp_by_target(logits, groups.target, groups.merged.shape[-1])


def log_votes_of(view: View) -> Tensor:
    """Log-votes [B, K, T] float32; zeros where there are none."""
    if view.log_votes is not None:
        return view.log_votes
    return view.keys.new_zeros(view.positions.shape, dtype=torch.float32)


def newest_queries(view: View) -> Tensor:
    """The newest query of each query head, [B, K, G, D]; zeros in rows without queries."""
    newest: Tensor = to_float(view.window[:, :, -1]).unflatten(1, (view.keys.shape[1], -1))
    return newest.masked_fill((view.window_positions[:, -1] < 0)[:, None, None, None], 0.0)
