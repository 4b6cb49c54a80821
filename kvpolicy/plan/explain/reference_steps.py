"""The bytes that the steps of a compression must move when they run in torch, from the shapes alone.

Every input and every output of a step is counted once: the least that any implementation moves which keeps the steps
apart.
"""

from collections.abc import Iterator

from kvpolicy.plan.compress.fusion import Term
from kvpolicy.plan.explain.reads import reads_of
from kvpolicy.plan.explain.steps import Shapes, Step, name_of
from kvpolicy.plan.forward_observers import ATTENTION
from kvpolicy.plan.plan import POSITIONS, Plan
from kvpolicy.stages.registry.plugins import registry

_FLOAT, _MASK, _COUNT = 4, 1, 8  # bytes of a score, a mask element, an int64 count
_DROP = "drop"


def observe_steps(plan: Plan, shapes: Shapes) -> Iterator[Step]:
    """Once for each forward since the last compression: queries are copied, attention mass is added up."""
    vector = plan.geometry.head_dim * plan.dtype.itemsize
    query = plan.geometry.query_heads * vector
    if plan.needs.queries:
        each = 1 if len(shapes.forwards) == shapes.new else min(shapes.new, plan.needs.queries)
        copied = len(shapes.forwards) * each * query
        yield Step("observe", f"last {plan.needs.queries} queries", copied, copied, ("queries",))
    if plan.needs.attention:
        attended = sum(shapes.forwards) * plan.geometry.kv_heads
        mass = attended * plan.columns[ATTENTION].bytes_per_slot
        read = attended * vector + shapes.new * query + mass
        yield Step("observe", "attention mass", read, mass, ("keys", "queries", "attention"))
    for observer in plan.chunk_observers:
        state = shapes.new * plan.geometry.kv_heads * len(observer.columns) * _FLOAT
        read = shapes.new * (plan.geometry.kv_heads * vector + query)
        yield Step("observe", f"chunks of {observer.size}", read, state, ("keys", "queries"))


def score_step(plan: Plan, shapes: Shapes, term: Term, unfused: str = "") -> Step:
    """One term: what the scorer reads, and its scores and slot state."""
    scorer, geometry = term.weighted.scorer, plan.geometry
    slots, vector = shapes.held * geometry.kv_heads, geometry.head_dim * plan.dtype.itemsize
    sizes = {
        "keys": slots * vector,
        "values": slots * vector,
        "queries": scorer.needs().queries * geometry.query_heads * vector,
        POSITIONS: slots * plan.columns[POSITIONS].bytes_per_slot,
        ATTENTION: slots * geometry.group * _FLOAT,
    }
    reads = reads_of(scorer, geometry)
    read = sum(sizes.get(column, slots * _FLOAT) for column in reads.columns)  # slot state is a float per slot
    written = slots * _FLOAT * (1 + len(scorer.slot_state()))
    reason = f"what it reads is unknown ({reads.error})" if reads.error else unfused
    name = f"{term.weighted.weight:+g} {name_of(scorer)}"
    return Step("score", name, read, written, reads.columns, reason=reason)


def steps_by_stage(plan: Plan, shapes: Shapes) -> dict[str, Step]:
    """Allocate, select, merge, store, and compact, which takes the place of both where entries only move.

    Budgets that are the same for every head need no scores, only how many candidates there are. Dropping touches kept
    entries only; any other merger may look at all of them. Of what is kept, as much moves as has to stand elsewhere.
    """
    spec, entry_bytes, heads = plan.spec, plan.footprint.entry_bytes, plan.geometry.kv_heads
    slots, kept, pair = shapes.held * heads, shapes.kept * heads, 2 * plan.geometry.head_dim * plan.dtype.itemsize
    scores, entries = ("scores", "candidates"), ("keys", "values", *plan.columns)
    counted = scores if plan.ragged else scores[1:]
    looked_at = kept if registry().identity(type(spec.merge)) == _DROP else slots
    others = sum(column.bytes_per_slot for column in plan.columns.values())
    moved = min(kept, slots - kept) if plan.fills_holes else kept
    moved_bytes, how = round(moved * entry_bytes), "fills holes" if plan.fills_holes else "closes up"
    candidates = slots * (_MASK + (_FLOAT if plan.ragged else 0))
    merger, store = name_of(spec.merge), name_of(spec.store)
    steps = (
        Step("allocate", name_of(spec.allocate.divider), candidates, heads * _COUNT, counted),
        Step("select", name_of(spec.select), slots * (_FLOAT + _MASK), slots * _MASK, scores),
        Step("merge", merger, looked_at * pair, kept * pair, entries[:2]),
        Step("store", store, kept * (pair + others), round(kept * entry_bytes), entries),
        Step("compact", merger, moved_bytes, moved_bytes, entries, reason=f"{how}, at most"),
    )
    return {step.stage: step for step in steps}
