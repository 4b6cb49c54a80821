"""The bytes that the steps of a compression must move when they run in torch, from the shapes alone.

Every input and every output of a step is counted once: the least that any implementation moves which keeps the steps
apart.
"""

from collections.abc import Sequence

import attrs

from kvpolicy.plan.compress.fusion import Term
from kvpolicy.plan.explain.reads import reads_of
from kvpolicy.plan.explain.steps import Shapes, Step, name_of
from kvpolicy.plan.followers import ATTENTION
from kvpolicy.plan.plan import POSITIONS, Plan
from kvpolicy.stages.registry import registry

_FLOAT, _MASK, _COUNT = 4, 1, 8  # bytes of a score, a mask element, an int64 count
_DROP = "drop"


@attrs.frozen
class ReferenceSteps:
    """Steps of a plan without kernels, for one layer and sequence."""

    plan: Plan
    shapes: Shapes

    @property
    def _heads(self) -> int:
        return self.plan.geometry.kv_heads

    @property
    def _slots(self) -> int:
        return self.shapes.held * self._heads

    @property
    def _vector(self) -> int:
        """Bytes of a decoded key or value."""
        return self.plan.geometry.head_dim * self.plan.dtype.itemsize

    def observe(self) -> Sequence[Step]:
        """Once for each forward since the last compression: queries are copied, attention mass is added up."""
        plan, shapes, steps = self.plan, self.shapes, []
        query = plan.geometry.query_heads * self._vector
        if plan.needs.queries:
            each = 1 if len(shapes.forwards) == shapes.new else min(shapes.new, plan.needs.queries)
            copied = len(shapes.forwards) * each * query
            steps.append(Step("observe", f"last {plan.needs.queries} queries", copied, copied, ("queries",)))
        if plan.needs.attention:
            attended = sum(shapes.forwards) * self._heads
            mass = attended * plan.columns[ATTENTION].bytes_per_slot
            read = attended * self._vector + shapes.new * query + mass
            steps.append(Step("observe", "attention mass", read, mass, ("keys", "queries", "attention")))
        return steps

    def score(self, term: Term, unfused: str = "") -> Step:
        """One term: what the scorer reads, and its scores and slot state."""
        scorer = term.weighted.scorer
        reads, sizes = reads_of(scorer, self.plan.geometry), self._column_bytes(scorer.needs().queries)
        read = sum(sizes.get(column, self._slots * _FLOAT) for column in reads.columns)  # slot state: a float per slot
        written = self._slots * _FLOAT * (1 + len(scorer.slot_state()))
        reason = f"what it reads is unknown ({reads.error})" if reads.error else unfused
        name = f"{term.weighted.weight:+g} {name_of(scorer)}"
        return Step("score", name, read, written, reads.columns, reason=reason)

    def _column_bytes(self, queries: int) -> dict[str, int]:
        return {
            "keys": self._slots * self._vector,
            "values": self._slots * self._vector,
            "queries": queries * self.plan.geometry.query_heads * self._vector,
            POSITIONS: self._slots * self.plan.columns[POSITIONS].bytes_per_slot,
            ATTENTION: self._slots * self.plan.geometry.group * _FLOAT,
        }

    def allocate(self) -> Step:
        """Budgets that are the same for every head need no scores, only how many candidates there are."""
        ragged = self.plan.ragged
        read = self._slots * (_MASK + (_FLOAT if ragged else 0))
        columns = ("scores", "candidates") if ragged else ("candidates",)
        return Step("allocate", name_of(self.plan.spec.allocate.divider), read, self._heads * _COUNT, columns)

    def select(self) -> Step:
        """Keep indices, as a mask."""
        read, columns = self._slots * (_FLOAT + _MASK), ("scores", "candidates")
        return Step("select", name_of(self.plan.spec.select), read, self._slots * _MASK, columns)

    def merge(self) -> Step:
        """Dropping touches kept entries only; any other merger may look at all of them."""
        merger, kept, pair = self.plan.spec.merge, self.shapes.kept * self._heads, 2 * self._vector
        read = kept if registry().identity(type(merger)) == _DROP else self._slots
        return Step("merge", name_of(merger), read * pair, kept * pair, ("keys", "values"))

    def store(self) -> Step:
        """Kept entries are encoded and written, and what else a slot holds moves with them."""
        plan, kept = self.plan, self.shapes.kept * self._heads
        others = sum(column.bytes_per_slot for column in plan.columns.values())
        written = round(kept * plan.footprint.entry_bytes)
        read = kept * (2 * self._vector + others)
        return Step("store", name_of(plan.spec.store), read, written, ("keys", "values", *plan.columns))

    def compact(self) -> Step:
        """Of what is kept, as much as has to stand elsewhere, with all that a slot holds."""
        plan, kept = self.plan, self.shapes.kept
        moved = min(kept, self.shapes.held - kept) if plan.fills_holes else kept
        size = round(moved * self._heads * plan.footprint.entry_bytes)
        how = "fills holes" if plan.fills_holes else "closes up"
        columns = ("keys", "values", *plan.columns)
        return Step("compact", name_of(plan.spec.merge), size, size, columns, reason=f"{how}, at most")
