"""Entries per layer under the budget of a policy."""

import math
import warnings
from collections.abc import Sequence
from fractions import Fraction
from itertools import starmap
from typing import TypeVar

import attrs
import torch

from kvpolicy.errors import BudgetWarning, PolicyError, Problem
from kvpolicy.plan.footprint import Footprint
from kvpolicy.spec.policy import NEVER, PolicySpec
from kvpolicy.stages import AllocationRequest, Geometry
from kvpolicy.stages.checking.returned import check_tensor, contract_error

_MAX_REMEMBERED = 4096  # lengths whose counts are remembered
_PerLayer = tuple[int, ...]
_Key = TypeVar("_Key")
_HOST = torch.device("cpu")


@attrs.frozen(eq=False)
class Budgets:
    """How many entries each layer may hold, for one geometry. Counts are per KV head and sequence."""

    spec: PolicySpec
    geometry: Geometry
    footprint: Footprint
    # Caches by number of tokens: queried many times per token. Attributes, so that they are freed with the plan.
    _allocated: dict[int, _PerLayer] = attrs.field(init=False, factory=dict, repr=False)
    # by average and protected entries
    _divided: dict[tuple[int, int], _PerLayer] = attrs.field(init=False, factory=dict, repr=False)
    _ahead: dict[int, _PerLayer] = attrs.field(init=False, factory=dict, repr=False)
    # by number of tokens and of protected ones
    _on_top: dict[tuple[int, int], _PerLayer] = attrs.field(init=False, factory=dict, repr=False)
    _size_entries: list[int] = attrs.field(init=False, factory=list, repr=False)  # entries that fit a budget in bytes
    _warnings: list[str] = attrs.field(init=False, factory=list, repr=False)  # warnings given so far

    def __attrs_post_init__(self) -> None:
        size = self.spec.budget.size
        if size is None:
            return
        self._size_entries.append(self.affordable(size))
        if self._size_entries[0] <= self.spec.protect.total:
            min_bytes = self.footprint.nbytes(self.spec.protect.total + 1 + self.slack) + self._fixed_bytes
            raise PolicyError(
                [Problem("budget", f"must be at least {min_bytes} bytes for this model: {self.spec.budget}")]
            )

    @property
    def keeps_everything(self) -> bool:
        """Whether nothing is ever evicted, at any length."""
        return self.spec.budget.share == 1

    @property
    def slack(self) -> int:
        """Tokens that may be added on top of the budget before the next compression."""
        every = self.spec.compress.every
        return 0 if every == NEVER or self.keeps_everything else int(every)

    def affordable(self, size: int) -> int:
        """Entries per KV head that fit into `size` bytes per sequence, besides slack, observed queries and state."""
        return self.footprint.entries(size - self._fixed_bytes) - self.slack

    @property
    def _fixed_bytes(self) -> int:
        return self.footprint.window_bytes + self.footprint.state_bytes

    def average(self, num_tokens: int) -> int:
        """Entries per KV head, averaged over layers, for a sequence of `num_tokens` tokens.

        For a budget of what was generated, of a sequence without a prompt.
        """
        budget = self.spec.budget
        if budget.tokens is not None:
            return budget.tokens
        if budget.size is not None:
            return self._size_entries[0]
        if budget.generated is not None:
            return self._with_generated(num_tokens, min(self.spec.protect.total, num_tokens))
        return max(self._share_of(num_tokens), self.spec.protect.total, 1)

    def protected(self, num_tokens: int) -> tuple[int, int]:
        """Sinks and recent entries of a sequence with `num_tokens` tokens, in every layer and head: at most `average`.

        They depend on `num_tokens` only if the budget is a share of the tokens and they are shares of the budget.
        """
        return self.spec.protect.of(self.average(num_tokens))

    def entries(self, ordinal: int, num_tokens: int, min_entries: int = 0) -> int:
        """Entries per KV head that a managed layer may hold of a row of `num_tokens` tokens.

        `min_entries` are those that are protected where that depends on the request, 0 where it does not.
        """
        return max(self.by_layer(num_tokens, min_entries)[ordinal], min_entries)

    def by_layer(self, num_tokens: int, min_entries: int = 0) -> _PerLayer:
        """The same for all managed layers, of which each holds `min_entries` anyway."""
        if self.spec.budget.generated is not None:
            return self._on_top_of(num_tokens, min_entries)
        return self.per_layer(num_tokens)

    def per_layer(self, num_tokens: int) -> _PerLayer:
        """Entries per KV head of each managed layer, for a sequence of `num_tokens` tokens, without a request."""
        counts = self._allocated.get(num_tokens)
        return _remember(self._allocated, num_tokens, self._allocate(num_tokens)) if counts is None else counts

    def ahead(self, num_tokens: int, min_entries: int = 0) -> _PerLayer:
        """The larger counts of `per_layer` now and for twice as many tokens: a limit for the growth of storage.

        For a budget that grows with the tokens it is the budget itself, so that memory stays close to the share.
        `min_entries` as in `entries`.
        """
        if self.spec.budget.generated is not None:
            return self._on_top_of(num_tokens, min_entries)
        if self.spec.budget.share is not None:
            return self.per_layer(num_tokens)
        counts = self._ahead.get(num_tokens)
        if counts is None:
            counts = tuple(map(max, self.per_layer(num_tokens), self.per_layer(2 * num_tokens)))
            _remember(self._ahead, num_tokens, counts)
        return counts

    def raised(self, num_tokens: int) -> str:
        """Why a sequence of `num_tokens` tokens holds more than its share of them; empty if it does not."""
        share, average = self._share_of(num_tokens), min(self.average(num_tokens), num_tokens)
        if self.spec.budget.share is None or average <= max(share, 1):
            return ""
        return (
            f"policy {self.spec.name}: {self.spec.budget} of {num_tokens} tokens is {share} entries, but "
            f"{average} are held because they are protected; give protect.sinks and protect.recent as shares of the "
            "budget to hold less"
        )

    def say_if_raised(self, num_tokens: Sequence[int], min_entries: Sequence[int]) -> None:
        """Warn if rows of `num_tokens` tokens hold more than their budget, once for all caches of a plan.

        `min_entries` are the entries of each row that are protected by spans of its request; 0 without such spans.
        """
        if self._warnings or (self.spec.budget.share is None and not self.spec.protect.by_place):
            return
        rows = dict.fromkeys(zip(num_tokens, min_entries, strict=True))  # of several that are alike one
        reasons = [*map(self.raised, dict.fromkeys(num_tokens)), *starmap(self._raised_by_spans, rows)]
        message = next(filter(None, reasons), "")
        if message:
            self._warnings.append(message)
            warnings.warn(message, BudgetWarning, stacklevel=2)

    def _raised_by_spans(self, num_tokens: int, min_entries: int) -> str:
        """Why a sequence of `num_tokens` tokens holds more than its budget because of protected spans; empty if not."""
        average = min(self.average(num_tokens), num_tokens)
        if min_entries <= average or self.spec.budget.generated is not None:
            return ""
        return (
            f"policy {self.spec.name}: the budget of {num_tokens} tokens is {average} entries, but "
            f"{min_entries} are held because they are protected, in the prompt or in regions"
        )

    def protected_alike(self, num_tokens: Sequence[int], rows: Sequence[int]) -> list[list[int]]:
        """Rows, of `num_tokens` tokens each, in groups with equal numbers of protected entries.

        A view has one such number for all of its rows.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for row in rows:
            groups.setdefault(self.protected(num_tokens[row]), []).append(row)
        return list(groups.values())

    def _share_of(self, num_tokens: int) -> int:
        """The budget in entries, rounded down, if it is a share of the tokens; otherwise all tokens."""
        share = self.spec.budget.share
        return num_tokens if share is None else num_tokens * share.numerator // share.denominator

    def _with_generated(self, num_tokens: int, protected: int) -> int:
        """The protected tokens, and the budget's share of the others, rounded up."""
        share = self.spec.budget.generated or Fraction(0)
        return protected + math.ceil(share * (num_tokens - protected))

    def _on_top_of(self, num_tokens: int, min_entries: int) -> _PerLayer:
        """Entries of each layer of a row, for a budget of what was generated."""
        counts = self._on_top.get((num_tokens, min_entries))
        if counts is None:
            average = self._with_generated(num_tokens, min_entries)
            counts = self._shares(average, min_entries, num_tokens)
            _remember(self._on_top, (num_tokens, min_entries), counts)
        return counts

    def _allocate(self, num_tokens: int) -> _PerLayer:
        protected = min(sum(self.protected(num_tokens)), num_tokens)
        return self._shares(min(self.average(num_tokens), num_tokens), protected, num_tokens)

    def _shares(self, average: int, protected: int, num_tokens: int) -> _PerLayer:
        """Entries of each layer, `average` per layer, of `num_tokens` tokens of which so many are `protected`."""
        if average == num_tokens:  # every layer holds all tokens
            return (num_tokens,) * self.geometry.layers
        if self.spec.allocate.layers.follows_length:
            return self._divide(average, protected, num_tokens)
        counts = self._divided.get((average, protected))
        if counts is None:
            counts = _remember(self._divided, (average, protected), self._divide(average, protected, num_tokens))
        return counts

    def _divide(self, average: int, protected: int, num_tokens: int) -> _PerLayer:
        """Entries of each layer by the allocator, `average` per layer, for a sequence of `num_tokens` tokens."""
        layers, allocator = self.geometry.layers, self.spec.allocate.layers
        request = AllocationRequest.of_lengths(layers, average, protected, [num_tokens])
        counts = allocator.allocate(request)
        check_tensor(allocator, counts, {"layers": layers, "batch": 1, "kv_heads": 1}, torch.int64, _HOST)
        shares: list[int] = counts.flatten().tolist()
        if not all(0 <= share <= num_tokens - protected for share in shares):
            raise contract_error(allocator, f"returned {shares}, expected counts from 0 to {num_tokens - protected}")
        return tuple(share + protected for share in shares)


def _remember(remembered: dict[_Key, _PerLayer], key: _Key, counts: _PerLayer) -> _PerLayer:
    if len(remembered) >= _MAX_REMEMBERED:
        remembered.clear()
    remembered[key] = counts
    return counts
