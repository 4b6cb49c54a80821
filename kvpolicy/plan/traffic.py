"""The bytes that one compression of one layer and sequence must move, step by step, from the shapes alone.

Every input and every output of a step is counted once: the least that any implementation moves which keeps the steps
apart. T entries per KV head are held when it starts, N are left; K KV heads, H query heads, D head dim.
"""

from collections.abc import Iterator, Sequence

import attrs

from kvpolicy.plan.compress.fusion import Term
from kvpolicy.plan.forward_observers import ATTENTION
from kvpolicy.plan.fused_traffic import allocate_step, compact_step, finish_step, score_steps, select_step
from kvpolicy.plan.plan import POSITIONS, Plan
from kvpolicy.plan.reads import reads_of
from kvpolicy.plan.steps import Shapes, Step
from kvpolicy.stages.registry.plugins import registry

_FLOAT, _MASK, _COUNT = 4, 1, 8  # bytes of a score, a mask element, an int64 count
_DROP = "drop"


def steps_of(plan: Plan, shapes: Shapes) -> tuple[Step, ...]:
    """Observe, each term of the score, allocate, select, merge, store: in the order in which they run."""
    if not plan.fusion.off:
        return (*_observe(plan, shapes), *_fused(plan, shapes))
    terms = (_score(plan, term, shapes, "") for term in plan.fusion.terms)
    kept = (_merge(plan, shapes), _store(plan, shapes)) if _against_moving(plan) else (_move(plan, shapes),)
    return (*_observe(plan, shapes), *terms, _allocate(plan, shapes), _select(plan, shapes), *kept)


def _fused(plan: Plan, shapes: Shapes) -> Iterator[Step]:
    """The steps of a plan with kernels; what none of them does is a reference between them."""
    fusion = plan.fusion
    tiled = [term for term in fusion.terms if term.tile is not None]
    yield from score_steps(plan, shapes, tiled)
    yield from (_score(plan, term, shapes, term.reason) for term in fusion.terms if term.tile is None)
    yield finish_step(plan, shapes)
    allocated = _allocate(plan, shapes)
    yield attrs.evolve(allocated, reason=fusion.allocate) if fusion.allocate else allocate_step(plan, shapes)
    yield attrs.evolve(_select(plan, shapes), reason=fusion.select) if fusion.select else select_step(plan, shapes)
    against = _against_moving(plan)
    if against:
        yield attrs.evolve(_merge(plan, shapes), reason=against)
        yield attrs.evolve(_store(plan, shapes), reason=against)
    else:
        yield compact_step(plan, shapes)


def _against_moving(plan: Plan) -> str:
    """Why there is more to do than to move what is kept; empty if there is not."""
    return plan.fusion.merge or ("packs what it keeps" if plan.packs else "")


def _observe(plan: Plan, shapes: Shapes) -> Sequence[Step]:
    """Once for each forward since the last compression: queries are copied, attention mass is added up."""
    heads, steps = plan.geometry.kv_heads, []
    query = plan.geometry.query_heads * plan.geometry.head_dim * plan.dtype.itemsize
    if plan.needs.queries:
        each = 1 if len(shapes.forwards) == shapes.new else min(shapes.new, plan.needs.queries)
        copied = len(shapes.forwards) * each * query
        steps.append(Step("observe", f"last {plan.needs.queries} queries", copied, copied, ("queries",)))
    if plan.needs.attention:
        slots = sum(shapes.forwards) * heads
        mass = slots * plan.columns[ATTENTION].bytes_per_slot
        keys = slots * plan.geometry.head_dim * plan.dtype.itemsize
        read = ("keys", "queries", "attention")
        steps.append(Step("observe", "attention mass", keys + shapes.new * query + mass, mass, read))
    return steps


def _score(plan: Plan, term: Term, shapes: Shapes, unfused: str) -> Step:
    weighted, slots = term.weighted, shapes.held * plan.geometry.kv_heads
    scorer = weighted.scorer
    reads = reads_of(scorer, plan.geometry)
    sizes = _column_sizes(plan, scorer.needs().queries, slots)
    read = sum(sizes.get(name, slots * _FLOAT) for name in reads.columns)
    written = slots * _FLOAT * (1 + len(scorer.slot_state()))
    reason = f"what it reads is unknown ({reads.error})" if reads.error else unfused
    name = f"{weighted.weight:+g} {registry().reference(type(scorer))}"
    return Step("score", name, read, written, reads.columns, reason=reason)


def _column_sizes(plan: Plan, queries: int, slots: int) -> dict[str, int]:
    """Bytes of what a view shows; slot state, which is not among them, is a float per slot."""
    vector = plan.geometry.head_dim * plan.dtype.itemsize
    return {
        "keys": slots * vector,
        "values": slots * vector,
        "queries": queries * plan.geometry.query_heads * vector,
        POSITIONS: slots * plan.columns[POSITIONS].bytes_per_slot,
        ATTENTION: slots * plan.geometry.group * _FLOAT,
    }


def _allocate(plan: Plan, shapes: Shapes) -> Step:
    """Budgets that are the same for every head need no scores, only how many candidates there are."""
    heads, name = plan.geometry.kv_heads, registry().reference(type(plan.spec.allocate.divider))
    slot = _MASK + (_FLOAT if plan.ragged else 0)
    columns = ("scores", "candidates") if plan.ragged else ("candidates",)
    return Step("allocate", name, shapes.held * heads * slot, heads * _COUNT, columns)


def _select(plan: Plan, shapes: Shapes) -> Step:
    slots = shapes.held * plan.geometry.kv_heads
    name = registry().reference(type(plan.spec.select))
    return Step("select", name, slots * (_FLOAT + _MASK), slots * _MASK, ("scores", "candidates"))


def _merge(plan: Plan, shapes: Shapes) -> Step:
    """Dropping touches kept entries only; any other merger may look at all of them."""
    heads, name = plan.geometry.kv_heads, registry().reference(type(plan.spec.merge))
    looked_at = shapes.kept if registry().identity(type(plan.spec.merge)) == _DROP else shapes.held
    return Step("merge", name, looked_at * heads * _pair(plan), shapes.kept * heads * _pair(plan), ("keys", "values"))


def _store(plan: Plan, shapes: Shapes) -> Step:
    """Kept entries are encoded and written, and what else a slot holds moves with them."""
    slots, name = shapes.kept * plan.geometry.kv_heads, registry().reference(type(plan.spec.store))
    extra = sum(column.bytes_per_slot for column in plan.columns.values())
    written = round(slots * plan.footprint.entry_bytes)
    return Step("store", name, slots * (_pair(plan) + extra), written, ("keys", "values", *plan.columns))


def _move(plan: Plan, shapes: Shapes) -> Step:
    """Of what is kept, as much as has to stand elsewhere, with all that a slot holds."""
    moved = min(shapes.kept, shapes.held - shapes.kept) if plan.fills_holes else shapes.kept
    size = moved * plan.geometry.kv_heads * plan.footprint.entry_bytes
    columns, how = ("keys", "values", *plan.columns), "fills holes" if plan.fills_holes else "closes up"
    name = registry().reference(type(plan.spec.merge))
    return Step("compact", name, round(size), round(size), columns, reason=f"{how}, at most")


def _pair(plan: Plan) -> int:
    """Bytes of a decoded key and value."""
    return 2 * plan.geometry.head_dim * plan.dtype.itemsize
