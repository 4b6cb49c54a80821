"""Merger `keepkv`: merges evicted entries so that the output of the next query does not change."""

from collections.abc import Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Choice, Entries, Merger, Needs, Number, QueryLogits, State, View, parameter
from kvpolicy_plugins.mergers.keepkv_groups import ScoredGroups, fold
from kvpolicy_plugins.mergers.shared.few_groups import FewGroups
from kvpolicy_plugins.mergers.shared.merge_groups import (
    Groups,
    evicted_of,
    groups_of,
    logsumexp_by_target,
    nearest,
    reaches,
    to_float,
)
from kvpolicy_plugins.mergers.shared.merged_entries import changed_entries, kept_with_votes, log_votes_of
from kvpolicy_plugins.mergers.shared.score_estimates import Estimate, MovingAverage, ScoreFold, WindowMean
from kvpolicy_plugins.mergers.shared.window_logits import newest_queries
from kvpolicy_plugins.shared.limits import QUERIES

LOSSLESS = ("additive", "bias")


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
        joins = evicted & reaches(similarity, self.threshold)
        few = FewGroups.of(view, kept, joins, index)
        if few is None:
            return self.merge_groups(view, kept, groups_of(kept, joins, index))
        return few.whole(self.merge_groups(few.view, few.kept, few.groups), view, kept)

    def merge_groups(self, view: View, kept: Tensor, groups: Groups) -> Entries:
        """The entries [B, K, N] of given groups; groups of one are unchanged, bit for bit."""
        if not kept.shape[-1]:
            return kept_with_votes(view, kept)
        estimate, log_votes = self._estimate, log_votes_of(view)
        merged = self._merged(view, groups, estimate.log_scores(view.slot_state), log_votes)
        state = estimate.merged(view.slot_state, kept, ScoreFold(groups, log_votes, merged[2]))
        return changed_entries(view, kept, groups.merged, merged, state)

    def _merged(
        self, view: View, groups: Groups, log_scores: Tensor, log_votes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and log-votes of the groups; undefined for groups of one."""
        precise = to_float(view.keys).dtype
        folded = fold(view.keys, view.values, log_scores.to(precise), log_votes.to(precise), groups)
        if self.key != "scale":
            keys, votes = self._corrected(self.key, folded, view, groups)
            return keys, folded.values, votes
        scale = folded.scale
        fits = (scale > 0) & (scale <= self.scale_max)
        keys, votes = self._corrected(self.fallback, folded, view, groups)
        keys = torch.where(fits[..., None], scale[..., None] * folded.keys, keys)
        return keys, folded.values, torch.where(fits, folded.log_votes, votes)

    def _corrected(self, key: str, folded: ScoredGroups, view: View, groups: Groups) -> tuple[Tensor, Tensor]:
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
