"""From the budget of a policy to entries per layer."""

from collections.abc import Sequence
from functools import lru_cache

import attrs

from kvpolicy.errors import PolicyError, Problem, one_line
from kvpolicy.plan.footprint import Footprint
from kvpolicy.spec.policy import NEVER, PolicySpec
from kvpolicy.stages import Geometry, LayerRequest
from kvpolicy.stages.checks import contract_error


@attrs.frozen(cache_hash=True)  # it is looked up many times a token
class Budgets:
    """Answers, for one geometry, how many entries each layer may hold. Counts are per KV head and sequence."""

    spec: PolicySpec
    geometry: Geometry
    footprint: Footprint

    def __attrs_post_init__(self) -> None:
        size = self.spec.budget.size
        if size is not None and self.affordable(size) <= self.spec.protect.total:
            least = self.footprint.nbytes(self.spec.protect.total + 1 + self.slack)
            raise PolicyError([Problem("budget", f"must be at least {least} bytes for this model: {self.spec.budget}")])

    @property
    def slack(self) -> int:
        """Tokens that may come on top of the budget before the next compression."""
        every = self.spec.compress.every
        return 0 if every == NEVER else int(every)

    def affordable(self, size: int) -> int:
        """Entries per KV head that `size` bytes hold for one sequence, beside the slack."""
        return self.footprint.entries(size) - self.slack

    def average(self, seen: int) -> int:
        """Entries per KV head, averaged over layers, once a sequence has `seen` tokens."""
        budget = self.spec.budget
        if budget.tokens is not None:
            return budget.tokens
        if budget.size is not None:
            return self.affordable(budget.size)
        share = int(seen * budget.share) if budget.share is not None else seen
        return max(share, self.spec.protect.total, 1)

    def per_layer(self, seen: int) -> tuple[int, ...]:
        """Entries per KV head for each managed layer, once a sequence has `seen` tokens."""
        return _allocated(self, seen)

    def ahead(self, seen: int) -> tuple[int, ...]:
        """The largest that `per_layer` gets until the tokens have doubled, so that storage may grow at that pace.

        A share of the tokens is not looked ahead of: memory follows it closely.
        """
        return _ahead(self, seen)


@lru_cache(maxsize=4096)
def _allocated(budgets: Budgets, seen: int) -> tuple[int, ...]:
    request = LayerRequest(
        layers=budgets.geometry.layers,
        budget=min(budgets.average(seen), seen),
        protected=min(budgets.spec.protect.total, seen),
        length=seen,
    )
    allocator = budgets.spec.allocate.layers
    shares = allocator.allocate(request)
    sound = isinstance(shares, Sequence) and len(shares) == request.layers
    if not sound or not all(type(one) is int and request.protected <= one <= seen for one in shares):
        expected = f"{request.layers} integers from {request.protected} to {seen}"
        raise contract_error(allocator, f"returned {one_line(shares, 100)}, expected {expected}")
    return tuple(shares)


@lru_cache(maxsize=4096)
def _ahead(budgets: Budgets, seen: int) -> tuple[int, ...]:
    now = budgets.per_layer(seen)
    return now if budgets.spec.budget.share is not None else tuple(map(max, now, budgets.per_layer(2 * seen)))
