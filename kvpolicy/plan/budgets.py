"""From the budget of a policy to entries per layer."""

import attrs

from kvpolicy.errors import PolicyError, Problem
from kvpolicy.plan.footprint import Footprint
from kvpolicy.spec.policy import NEVER, PolicySpec
from kvpolicy.stages import Geometry, LayerRequest
from kvpolicy.stages.checks import contract_error

_MOST_KNOWN = 4096  # lengths that are remembered


@attrs.frozen(eq=False)
class Budgets:
    """Answers, for one geometry, how many entries each layer may hold. Counts are per KV head and sequence."""

    spec: PolicySpec
    geometry: Geometry
    footprint: Footprint
    # By tokens seen: asked many times a token. The object's own, so that it goes when the plan goes.
    _allocated: dict[int, tuple[int, ...]] = attrs.field(init=False, factory=dict, repr=False)

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
        known = self._allocated.get(seen)
        if known is not None:
            return known
        if len(self._allocated) >= _MOST_KNOWN:
            self._allocated.clear()
        found = self._allocated[seen] = self._allocate(seen)
        return found

    def ahead(self, seen: int) -> tuple[int, ...]:
        """The largest that `per_layer` gets until the tokens have doubled, so that storage may grow at that pace.

        A share of the tokens is not looked ahead of: memory follows it closely.
        """
        now = self.per_layer(seen)
        return now if self.spec.budget.share is not None else tuple(map(max, now, self.per_layer(2 * seen)))

    def _allocate(self, seen: int) -> tuple[int, ...]:
        request = LayerRequest(
            layers=self.geometry.layers,
            budget=min(self.average(seen), seen),
            protected=min(self.spec.protect.total, seen),
            length=seen,
        )
        allocator = self.spec.allocate.layers
        shares = allocator.allocate(request)
        if len(shares) != request.layers or any(type(one) is not int or one < request.protected for one in shares):
            expected = f"expected {request.layers} integers >= {request.protected}"
            raise contract_error(allocator, f"returned {shares}, {expected}")
        return shares
