"""Small inputs that plugins are tried on. Random, but the same in every run."""

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import one_line
from kvpolicy.stages.checks import contract_error
from kvpolicy.stages.contracts import Merger, Observer, Plugin, Scorer
from kvpolicy.stages.declared import needs_of, row_state_of, slot_state_of
from kvpolicy.stages.geometry import Geometry
from kvpolicy.stages.query_logits import QueryLogits
from kvpolicy.stages.slots import take
from kvpolicy.stages.view import View

KV_HEADS, GROUP, DIM = 2, 2, 16
LENGTHS = ((23, 23), (14, 14), (23, 9))  # alike, padded, ragged
SINKS, RECENT = 1, 3
WINDOW = 4  # queries of whoever reads what others observe
_JUNK = 997.0  # what an empty slot may hold


def sample_view(observer: Observer | None = None, *, lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> View:
    """A layer of `lengths` (entries per row and head), with what `observer` needs and the state of a new cache."""
    random = torch.Generator().manual_seed(1)
    held = torch.tensor(lengths)
    batch, heads, slots = *held.shape, int(held.max())

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float32)

    positions = torch.arange(slots).expand(batch, heads, slots)
    view = View(
        keys=normal(batch, heads, slots, DIM),
        values=normal(batch, heads, slots, DIM),
        positions=positions.where(positions < held[..., None], -1),
        geometry=Geometry((0,), heads * GROUP, heads, DIM),
        scaling=DIM**-0.5,
        sinks=SINKS,
        recent=RECENT,
    )
    return view if observer is None else _observed(observer, view, normal)


def _observed(observer: Observer, view: View, normal: Callable[..., Tensor]) -> View:
    batch, heads, slots = view.positions.shape
    needs = needs_of(observer)
    window = max(needs.queries, WINDOW if isinstance(observer, Merger) and observer.reads_window else 0)
    queries = normal(batch, heads * GROUP, window, DIM) if window else None
    attention = normal(batch, heads, GROUP, slots).abs() if needs.attention else None
    shape, states = view.positions.shape, slot_state_of(observer)
    state = {one.name: torch.full(shape, one.fill, dtype=torch.float32) for one in states}
    view = attrs.evolve(view, queries=queries, attention=attention, slot_state=state)
    if not isinstance(observer, Merger):
        return view
    rows = {one.name: torch.full((batch,), one.fill, dtype=torch.float32) for one in row_state_of(observer)}
    votes = normal(*view.positions.shape).abs() if observer.votes else None
    return attrs.evolve(view, row_state=rows, log_votes=votes)


def query_logits_of(observer: Observer, view: View) -> QueryLogits:
    """What as many queries as `observer` follows see: the newest of them everything, one before it one entry less."""
    count = needs_of(observer).forward_queries
    logits = _random_logits(view, count)
    back = torch.arange(count - 1, -1, -1)[:, None]
    seen = view.valid[:, :, None] & (view.age[:, :, None] >= back)
    return QueryLogits(logits.masked_fill(~seen[:, :, None], -torch.inf), view.log_votes)


def pass_logits_of(view: View, count: int = 5) -> QueryLogits:
    """What `count` queries of a pass see: all entries, and of the pass itself one more each."""
    logits = _random_logits(view, count).masked_fill(~view.valid[:, :, None, None], -torch.inf)
    own = torch.arange(1, count + 1, dtype=torch.float32).log().expand(logits.shape[:-1])
    return QueryLogits(logits, view.log_votes, own.clone())


def queries_of(query_logits: QueryLogits, queries: slice) -> QueryLogits:
    """Some of the queries."""
    own = query_logits.own
    return QueryLogits(
        query_logits.logits[..., queries, :], query_logits.log_votes, None if own is None else own[..., queries]
    )


def _random_logits(view: View, count: int) -> Tensor:
    """[B, K, G, count, T] float32."""
    random = torch.Generator().manual_seed(2)
    batch, heads, slots = view.positions.shape
    return torch.randn(batch, heads, GROUP, count, slots, generator=random, dtype=torch.float32)


def with_junk(view: View) -> View:
    """The same layer, with other contents in its empty slots."""
    empty = ~view.valid
    attention, votes = view.attention, view.log_votes
    return attrs.evolve(
        view,
        keys=view.keys.masked_fill(empty[..., None], _JUNK),
        values=view.values.masked_fill(empty[..., None], _JUNK),
        attention=None if attention is None else attention.masked_fill(empty[:, :, None], _JUNK),
        log_votes=None if votes is None else votes.masked_fill(empty, _JUNK),
    )


def rows_of(view: View, rows: list[int]) -> View:
    """The view of some rows alone, without slots that are empty in all of them."""
    slots = int(view.lengths[rows].max())

    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows]

    def cut(tensor: Tensor) -> Tensor:
        return tensor[rows][:, :, :slots]

    return attrs.evolve(
        view,
        keys=cut(view.keys),
        values=cut(view.values),
        positions=cut(view.positions),
        queries=part(view.queries),
        attention=None if view.attention is None else view.attention[rows][..., :slots],
        log_votes=None if view.log_votes is None else cut(view.log_votes),
        slot_state={name: cut(state) for name, state in view.slot_state.items()},
        row_state={name: state[rows] for name, state in view.row_state.items()},
    )


def shuffled(view: View) -> tuple[View, Tensor]:
    """The view with the entries of every head in another order, and which slot of it each of them came from."""
    random = torch.Generator().manual_seed(3)
    drawn = torch.rand(view.positions.shape, generator=random, dtype=torch.float32)
    slots = drawn.masked_fill(~view.valid, 2.0).argsort(dim=-1, stable=True)  # empty slots stay last

    def moved(tensor: Tensor) -> Tensor:
        return take(tensor, slots)

    other = attrs.evolve(
        view,
        keys=moved(view.keys),
        values=moved(view.values),
        positions=moved(view.positions),
        attention=None if view.attention is None else moved(view.attention.transpose(-1, -2)).transpose(-1, -2),
        log_votes=None if view.log_votes is None else moved(view.log_votes),
        slot_state={name: moved(state) for name, state in view.slot_state.items()},
        pinned=None if view.pinned is None else moved(view.pinned),
        regions=None if view.regions is None else moved(view.regions),
        in_order=False,
    )
    return other, slots


def heads_swapped(view: View) -> View:
    """The view with its KV heads, and the query heads that belong to them, in the opposite order."""

    def swapped(tensor: Tensor) -> Tensor:
        return tensor.flip(1)

    queries = view.queries
    if queries is not None:
        queries = queries.unflatten(1, (view.positions.shape[1], -1)).flip(1).flatten(1, 2)
    return attrs.evolve(
        view,
        keys=swapped(view.keys),
        values=swapped(view.values),
        positions=swapped(view.positions),
        queries=queries,
        attention=None if view.attention is None else swapped(view.attention),
        log_votes=None if view.log_votes is None else swapped(view.log_votes),
        slot_state={name: swapped(state) for name, state in view.slot_state.items()},
    )


def scored(scorer: Scorer, view: View) -> Tensor:
    """What the runtime does: observe, then score with the new state in view; [B, K, T] float32."""
    state = {**view.slot_state, **scorer.observe(view)}
    return scorer.score(attrs.evolve(view, slot_state=state))


def expect_close(plugin: Plugin, found: Tensor, expected: Tensor, when: str) -> None:
    """Refuses a difference that rounding does not explain; NaN equals NaN."""
    try:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    except AssertionError as error:
        raise contract_error(plugin, f"gives something else {when}: {one_line(error)}") from error
