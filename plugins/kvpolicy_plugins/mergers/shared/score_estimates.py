"""Estimates of the entries' future scores s = e^(raw logit) (KeepKV), stored in slot state as logarithms.

Scores are averaged over query heads, so an entry has one estimate. All tensors are float32, or all float64.
"""

import abc
import math
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import QueryLogits, State
from kvpolicy.stages.slots import gather
from kvpolicy_plugins.mergers.shared.merge_groups import Groups, logsumexp_by_target

_NO_SCORE = -torch.inf


class Estimate(abc.ABC):
    """How observed scores are combined into an expected score."""

    window: int  # how many of the newest queries of a forward are used

    @abc.abstractmethod
    def states(self) -> tuple[State, ...]:
        """The slot state of the estimate."""

    @abc.abstractmethod
    def updated(self, logits: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state [B, K, T] after queries with logits [B, K, w, T], oldest first; -inf = masked."""

    @abc.abstractmethod
    def log_scores(self, state: Mapping[str, Tensor]) -> Tensor:
        """The expected ln s [B, K, T]; -inf for entries that no query has seen."""

    @abc.abstractmethod
    def merged(self, state: Mapping[str, Tensor], kept: Tensor, fold: "ScoreFold") -> dict[str, Tensor]:
        """The state [B, K, N] of merged entries."""

    def observe_forward(self, query_logits: QueryLogits, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state after a forward."""
        logits = query_logits.logits[..., -self.window :, :]
        return self.updated(logits.logsumexp(2) - math.log(logits.shape[2]), state)


@attrs.frozen(eq=False)
class ScoreFold:
    """Scores of merged groups: attention mass is preserved, p_r·s_r = Σ p_i·s_i."""

    groups: Groups
    log_votes: Tensor  # [B, K, T] before
    merged_votes: Tensor  # [B, K, N] after

    def __call__(self, log_scores: Tensor) -> Tensor:
        """From ln s of the entries [B, K, T] to ln s of the groups [B, K, N]."""
        mass = (self.log_votes + log_scores).masked_fill(~self.groups.member, -torch.inf)
        total = logsumexp_by_target(mass, self.groups.target, self.merged_votes.shape[-1])
        return total - self.merged_votes


@attrs.frozen(eq=False)
class MovingAverage(Estimate):
    """S ← alpha·S + (1 - alpha)·s per query that sees the entry, over 1 - alpha^n after n of them (KeepKV, eq. 8)."""

    alpha: float
    window: int

    def states(self) -> tuple[State, ...]:
        return State("log_estimate", fill=_NO_SCORE), State("samples")

    def updated(self, logits: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen = (logits > -torch.inf).to(logits.dtype)
        if logits.shape[-2] == 1:  # as in a decode step, where no query comes after this one
            total, new = seen.squeeze(-2), logits.squeeze(-2)
        else:
            total = seen.sum(-2)
            later = total[..., None, :] - seen.cumsum(-2)  # queries after this one that see the entry
            new = (logits + self._log_decay(later)).logsumexp(-2)
        new = new + math.log1p(-self.alpha)
        old = state["log_estimate"] + self._log_decay(total)
        return {"log_estimate": torch.logaddexp(old, new), "samples": state["samples"] + total}

    def log_scores(self, state: Mapping[str, Tensor]) -> Tensor:
        return state["log_estimate"] - self._log_weight(state["samples"])

    def merged(self, state: Mapping[str, Tensor], kept: Tensor, fold: ScoreFold) -> dict[str, Tensor]:
        """S_r = Σ p_i·S_i / p_r if all were seen equally often; otherwise the expected scores are merged like this."""
        samples = gather(state["samples"], kept)
        log_estimate = fold(self.log_scores(state)) + self._log_weight(samples)
        return {"log_estimate": log_estimate, "samples": samples}

    def _log_decay(self, times: Tensor) -> Tensor:
        """Logarithm of alpha^times."""
        if self.alpha == 0:
            return torch.zeros_like(times).masked_fill(times > 0, -torch.inf)
        return times * math.log(self.alpha)

    def _log_weight(self, samples: Tensor) -> Tensor:
        """Logarithm of 1 - alpha^n; 0 for n = 0, where there is nothing to correct."""
        return torch.log1p(-self._log_decay(samples).exp()).masked_fill(samples <= 0, 0.0)


@attrs.frozen(eq=False)
class WindowMean(Estimate):
    """The mean of s over those of the last `window` queries of a row that see the entry; `window` floats per slot.

    The scores of a merged entry are combined per query, but divided by the number of queries that have seen the kept
    entry, as in the released code of KeepKV, which goes by the position in the recent window.
    """

    window: int

    def states(self) -> tuple[State, ...]:
        return (*(State(name, fill=_NO_SCORE) for name in self._names()), State("samples"))

    def updated(self, logits: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = torch.cat([self._rows(state), logits], -2)
        seen = logits > -torch.inf
        in_use = seen.any(-1).any(1)  # [B, w]; queries of pads see no entry and are skipped
        in_use = torch.cat([in_use.new_ones(in_use.shape[0], self.window), in_use], -1)
        newest = in_use.int().argsort(dim=-1, stable=True)[:, -self.window :]
        index = newest[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[-1])
        samples = (state["samples"] + seen.sum(-2)).clamp(max=self.window)
        return {**dict(zip(self._names(), rows.gather(-2, index).unbind(-2), strict=True)), "samples": samples}

    def log_scores(self, state: Mapping[str, Tensor]) -> Tensor:
        return self._rows(state).logsumexp(-2) - state["samples"].clamp(min=1).log()

    def merged(self, state: Mapping[str, Tensor], kept: Tensor, fold: ScoreFold) -> dict[str, Tensor]:
        return {**{name: fold(state[name]) for name in self._names()}, "samples": gather(state["samples"], kept)}

    def _names(self) -> list[str]:
        """Oldest query first."""
        return [f"log_score_{back}" for back in range(self.window - 1, -1, -1)]

    def _rows(self, state: Mapping[str, Tensor]) -> Tensor:
        """[B, K, window, T]."""
        return torch.stack([state[name] for name in self._names()], -2)
