"""From the budget of a policy to entries per layer."""

import warnings
from collections.abc import Sequence
from typing import TypeVar

import attrs
import torch

from kvpolicy.errors import BudgetWarning, PolicyError, Problem
from kvpolicy.plan.footprint import Footprint
from kvpolicy.spec.policy import NEVER, PolicySpec
from kvpolicy.stages import AllocationRequest, Geometry
from kvpolicy.stages.checks import check_tensor, contract_error

_MOST_KNOWN = 4096  # lengths that are remembered
_PerLayer = tuple[int, ...]
_Key = TypeVar("_Key")
_HOST = torch.device("cpu")


@attrs.frozen(eq=False)
class Budgets:
    """Answers, for one geometry, how many entries each layer may hold. Counts are per KV head and sequence."""

    spec: PolicySpec
    geometry: Geometry
    footprint: Footprint
    # By tokens seen: asked many times a token. The object's own, so that it goes when the plan goes.
    _allocated: dict[int, _PerLayer] = attrs.field(init=False, factory=dict, repr=False)
    _divided: dict[tuple[int, int], _PerLayer] = attrs.field(init=False, factory=dict, repr=False)  # by average
    _ahead: dict[int, _PerLayer] = attrs.field(init=False, factory=dict, repr=False)
    _sized: list[int] = attrs.field(init=False, factory=list, repr=False)  # entries that a budget in bytes affords
    _said: list[str] = attrs.field(init=False, factory=list, repr=False)  # what has been warned of

    def __attrs_post_init__(self) -> None:
        size = self.spec.budget.size
        if size is None:
            return
        self._sized.append(self.affordable(size))
        if self._sized[0] <= self.spec.protect.total:
            least = self.footprint.nbytes(self.spec.protect.total + 1 + self.slack) + self._beside
            raise PolicyError([Problem("budget", f"must be at least {least} bytes for this model: {self.spec.budget}")])

    @property
    def keeps_everything(self) -> bool:
        """Whether nothing is ever evicted, at any length."""
        return self.spec.budget.share == 1

    @property
    def slack(self) -> int:
        """Tokens that may come on top of the budget before the next compression."""
        every = self.spec.compress.every
        return 0 if every == NEVER or self.keeps_everything else int(every)

    def affordable(self, size: int) -> int:
        """Entries per KV head that `size` bytes hold for one sequence, beside the slack, the queries and the state."""
        return self.footprint.entries(size - self._beside) - self.slack

    @property
    def _beside(self) -> int:
        return self.footprint.window_bytes + self.footprint.state_bytes

    def average(self, seen: int) -> int:
        """Entries per KV head, averaged over layers, once a sequence has `seen` tokens."""
        budget = self.spec.budget
        if budget.tokens is not None:
            return budget.tokens
        if budget.size is not None:
            return self._sized[0]
        return max(self._asked(seen), self.spec.protect.total, 1)

    def protected(self, seen: int) -> tuple[int, int]:
        """Sinks and recent entries of a sequence with `seen` tokens, in every layer and head: at most `average`.

        They depend on `seen` only where the budget is a share of the tokens, and they are a share of that.
        """
        return self.spec.protect.of(self.average(seen))

    def per_layer(self, seen: int) -> _PerLayer:
        """Entries per KV head for each managed layer, once a sequence has `seen` tokens."""
        known = self._allocated.get(seen)
        return _noted(self._allocated, seen, self._allocate(seen)) if known is None else known

    def ahead(self, seen: int) -> _PerLayer:
        """The largest that `per_layer` gets until the tokens have doubled, so that storage may grow at that pace.

        A share of the tokens is not looked ahead of: memory follows it closely.
        """
        if self.spec.budget.share is not None:
            return self.per_layer(seen)
        known = self._ahead.get(seen)
        if known is None:
            known = tuple(map(max, self.per_layer(seen), self.per_layer(2 * seen)))
            _noted(self._ahead, seen, known)
        return known

    def raised(self, seen: int) -> str:
        """Why a sequence with `seen` tokens holds more than its share of them; empty when it does not."""
        asked, average = self._asked(seen), min(self.average(seen), seen)
        if self.spec.budget.share is None or average <= max(asked, 1):
            return ""
        return (
            f"policy {self.spec.name}: {self.spec.budget} of {seen} tokens is {asked} entries, but {average} are held: "
            "as many are protected; give protect.sinks and protect.recent as shares of the budget to hold less"
        )

    def say_if_raised(self, real: Sequence[int], least: Sequence[int]) -> None:
        """Warn of what `raised` tells of rows with `real` tokens, once for all caches of a plan.

        `least` are the entries of each row that protected spans of its request make it keep, 0 where there are none.
        """
        if self._said or (self.spec.budget.share is None and not self.spec.protect.by_place):
            return
        message = next(filter(None, [*map(self.raised, real), *map(self._pinned, real, least)]), "")
        if message:
            self._said.append(message)
            warnings.warn(message, BudgetWarning, stacklevel=2)

    def _pinned(self, seen: int, least: int) -> str:
        """Why a sequence with `seen` tokens holds more than its budget, for the spans of it that are protected."""
        average = min(self.average(seen), seen)
        if least <= average:
            return ""
        return (
            f"policy {self.spec.name}: the budget of {seen} tokens is {average} entries, but {least} are held: as many "
            "are protected, in the prompt or in regions"
        )

    def protected_alike(self, real: Sequence[int], rows: Sequence[int]) -> list[list[int]]:
        """Some of the rows with `real` tokens in groups in which as many entries are protected.

        A view has one number for all of its rows.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for row in rows:
            groups.setdefault(self.protected(real[row]), []).append(row)
        return list(groups.values())

    def _asked(self, seen: int) -> int:
        """The share of the tokens that the policy asks for, rounded down; all, where the budget is no share."""
        share = self.spec.budget.share
        return seen if share is None else seen * share.numerator // share.denominator

    def _allocate(self, seen: int) -> _PerLayer:
        average, protected = min(self.average(seen), seen), min(sum(self.protected(seen)), seen)
        if average == seen:  # no layer can hold more, and none may hold less
            return (seen,) * self.geometry.layers
        if self.spec.allocate.layers.follows_length:
            return self._divide(average, protected, seen)
        known = self._divided.get((average, protected))
        if known is None:
            known = _noted(self._divided, (average, protected), self._divide(average, protected, seen))
        return known

    def _divide(self, average: int, protected: int, seen: int) -> _PerLayer:
        """What the allocator says of a sequence with `seen` tokens, of which each layer keeps `average`."""
        layers, allocator = self.geometry.layers, self.spec.allocate.layers
        request = AllocationRequest.of_lengths(layers, average, protected, [seen])
        counts = allocator.allocate(request)
        check_tensor(allocator, counts, {"layers": layers, "batch": 1, "kv_heads": 1}, torch.int64, _HOST)
        shares: list[int] = counts.flatten().tolist()
        if not all(0 <= share <= seen - protected for share in shares):
            raise contract_error(allocator, f"returned {shares}, expected counts from 0 to {seen - protected}")
        return tuple(share + protected for share in shares)


def _noted(known: dict[_Key, _PerLayer], key: _Key, shares: _PerLayer) -> _PerLayer:
    if len(known) >= _MOST_KNOWN:
        known.clear()
    known[key] = shares
    return shares
