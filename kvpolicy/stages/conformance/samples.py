"""Small random inputs for the checks of plugins, the same in every run."""

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import one_line
from kvpolicy.stages.checking.declared import needs_of, row_state_of, slot_state_of
from kvpolicy.stages.checking.returned import contract_error
from kvpolicy.stages.contracts import Allocator, Merger, Observer, Plugin, Scorer, ViewPlugin
from kvpolicy.stages.formats import Sample
from kvpolicy.stages.geometry import Geometry
from kvpolicy.stages.projected_values import output_norms
from kvpolicy.stages.query_logits import QueryLogits
from kvpolicy.stages.rotary import Rotary
from kvpolicy.stages.slots import take
from kvpolicy.stages.view import View

KV_HEADS, GROUP, DIM = 2, 2, 16
CHANNELS = 12  # of the hidden state
LENGTHS = ((23, 23), (14, 14), (23, 9))  # equal, padded, ragged
SINKS, RECENT = 1, 3
WINDOW = 4  # observed queries for mergers that read the window of other plugins
_JUNK = 997.0  # a number in empty slots


def sample_view(plugin: ViewPlugin | None = None, *, lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> View:
    """A layer with `lengths` entries per row and head, the inputs that `plugin` needs, and the initial slot state."""
    random = torch.Generator().manual_seed(1)
    counts = torch.tensor(lengths)
    batch, heads, slots = *counts.shape, int(counts.max())

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float32)

    positions = torch.arange(slots).expand(batch, heads, slots)
    view = View(
        keys=normal(batch, heads, slots, DIM),
        values=normal(batch, heads, slots, DIM),
        positions=positions.where(positions < counts[..., None], -1),
        geometry=Geometry((0,), heads * GROUP, heads, DIM),
        scaling=DIM**-0.5,
        sinks=SINKS,
        recent=RECENT,
    )
    return view if plugin is None else _observed(plugin, view, normal)


def of_another_layer(view: View) -> View:
    """The same entries in another layer, for which nothing was calibrated, and behind which nothing is known."""
    return attrs.evolve(view, layer=view.layer + 1, calibration={}, output_projection=None)


def _observed(plugin: ViewPlugin, view: View, normal: Callable[..., Tensor]) -> View:
    batch, heads, slots = view.positions.shape
    needs = needs_of(plugin)
    reads_window = isinstance(plugin, (Allocator, Merger)) and plugin.reads_window
    window = max(needs.queries, WINDOW if reads_window else 0)
    queries = normal(batch, heads * GROUP, window, DIM) if window else None
    attention = normal(batch, heads, GROUP, slots).abs() if needs.attention else None
    shape, states = view.positions.shape, slot_state_of(plugin) if isinstance(plugin, Observer) else ()
    state = {declared.name: torch.full(shape, declared.fill, dtype=torch.float32) for declared in states}
    view = attrs.evolve(view, queries=queries, attention=attention, slot_state=state)
    if needs.rotary:
        view = attrs.evolve(view, rotary=_rotary())
    if needs.regions:
        numbers = (view.positions.clamp(min=0) // 3 % (len(needs.regions) + 1)).to(torch.int8)
        starts = torch.arange(0, int(view.positions.max()) + 1, 3)
        spans = torch.stack([starts // 3 % (len(needs.regions) + 1), starts], -1).int().expand(batch, -1, -1)
        view = attrs.evolve(view, regions=numbers, region_names=needs.regions, region_spans=spans)
    if needs.output_projection:
        view = attrs.evolve(view, output_projection=normal(heads * GROUP, DIM, CHANNELS))
    if plugin.calibrated:
        view = attrs.evolve(view, calibration=plugin.calibrate([calibration_sample(0)])[0])
    if not isinstance(plugin, Merger):
        return view
    rows = {
        declared.name: torch.full((batch,), declared.fill, dtype=torch.float32) for declared in row_state_of(plugin)
    }
    votes = normal(*view.positions.shape).abs() if plugin.votes else None
    return attrs.evolve(view, row_state=rows, log_votes=votes)


def _rotary() -> Rotary:
    return Rotary(1 / torch.arange(1, DIM // 2 + 1, dtype=torch.float32))


def calibration_sample(layer: int) -> Sample:
    """A layer on calibration text: random queries, keys and values."""
    random = torch.Generator().manual_seed(10 + layer)
    queries, keys, values = (
        torch.randn(2, heads, 20, DIM, generator=random, dtype=torch.float32)
        for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    )
    geometry = Geometry(tuple(range(8)), KV_HEADS * GROUP, KV_HEADS, DIM)
    return Sample(geometry, DIM**-0.5, _rotary(), queries + 0.5, keys, values)


def query_logits_of(observer: Observer, view: View) -> QueryLogits:
    """Logits of the queries that `observer` needs: the newest sees all entries, each earlier one an entry less."""
    count = needs_of(observer).forward_queries
    logits = _random_logits(view, count)
    back = torch.arange(count - 1, -1, -1)[:, None]
    seen = view.valid[:, :, None] & (view.age[:, :, None] >= back)
    return QueryLogits(logits.masked_fill(~seen[:, :, None], -torch.inf), view.log_votes)


def pass_logits_of(scorer: Scorer, view: View, count: int = 5) -> QueryLogits:
    """What `count` queries of a pass see: all entries, and of the pass itself one more each; norms that are needed."""
    logits = _random_logits(view, count).masked_fill(~view.valid[:, :, None, None], -torch.inf)
    own = torch.arange(1, count + 1, dtype=torch.float32).log().expand(logits.shape[:-1])
    needs, outputs, hidden = needs_of(scorer), None, None
    if needs.output_projection:
        outputs = output_norms(view.values, view.projection)
    if needs.hidden_norms:
        hidden = torch.arange(1, count + 1, dtype=torch.float32).expand(logits.shape[0], -1).clone()
    return QueryLogits(logits, view.log_votes, own.clone(), output_norms=outputs, hidden_norms=hidden)


def queries_of(query_logits: QueryLogits, queries: slice) -> QueryLogits:
    """Some of the queries."""
    own, hidden = query_logits.own, query_logits.hidden_norms
    return attrs.evolve(
        query_logits,
        logits=query_logits.logits[..., queries, :],
        own=None if own is None else own[..., queries],
        hidden_norms=None if hidden is None else hidden[:, queries],
    )


def row_of(query_logits: QueryLogits, row: int) -> QueryLogits:
    """One of the rows."""
    tensors = ("logits", "log_votes", "own", "output_norms", "hidden_norms")
    shown = {name: tensor for name in tensors if (tensor := getattr(query_logits, name)) is not None}
    return attrs.evolve(query_logits, **{name: tensor[row : row + 1] for name, tensor in shown.items()})


def _random_logits(view: View, count: int) -> Tensor:
    """[B, K, G, count, T] float32."""
    random = torch.Generator().manual_seed(2)
    batch, heads, slots = view.positions.shape
    return torch.randn(batch, heads, GROUP, count, slots, generator=random, dtype=torch.float32)


def with_junk(view: View) -> View:
    """The view with other contents in its empty slots."""
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
    """The view of some rows, without slots that are empty in all of them."""
    slots = int(view.lengths[rows].max())

    def select(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows]

    def select_entries(tensor: Tensor) -> Tensor:
        return tensor[rows][:, :, :slots]

    return attrs.evolve(
        view,
        keys=select_entries(view.keys),
        values=select_entries(view.values),
        positions=select_entries(view.positions),
        queries=select(view.queries),
        attention=None if view.attention is None else view.attention[rows][..., :slots],
        log_votes=None if view.log_votes is None else select_entries(view.log_votes),
        regions=None if view.regions is None else select_entries(view.regions),
        region_spans=select(view.region_spans),
        slot_state={name: select_entries(state) for name, state in view.slot_state.items()},
        row_state={name: state[rows] for name, state in view.row_state.items()},
    )


def shuffled(view: View) -> tuple[View, Tensor]:
    """The view with the entries of each head shuffled, and the original slot of each entry."""
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
    """The view with its KV heads, and their query heads, in reverse order."""

    def swapped(tensor: Tensor) -> Tensor:
        return tensor.flip(1)

    queries, projection = view.queries, view.output_projection
    if queries is not None:
        queries = queries.unflatten(1, (view.positions.shape[1], -1)).flip(1).flatten(1, 2)
    if projection is not None:
        projection = projection.unflatten(0, (view.positions.shape[1], -1)).flip(0).flatten(0, 1)
    return attrs.evolve(
        view,
        keys=swapped(view.keys),
        values=swapped(view.values),
        positions=swapped(view.positions),
        queries=queries,
        output_projection=projection,
        attention=None if view.attention is None else swapped(view.attention),
        log_votes=None if view.log_votes is None else swapped(view.log_votes),
        regions=None if view.regions is None else swapped(view.regions),
        slot_state={name: swapped(state) for name, state in view.slot_state.items()},
    )


def scored(scorer: Scorer, view: View) -> Tensor:
    """Scores as the runtime computes them: observe, then score with the new slot state; [B, K, T] float32."""
    state = {**view.slot_state, **scorer.observe(view)}
    return scorer.score(attrs.evolve(view, slot_state=state))


def expect_close(plugin: Plugin, actual: Tensor, expected: Tensor, condition: str) -> None:
    """Raise PluginContractError for differences beyond rounding; NaN equals NaN."""
    try:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    except AssertionError as error:
        raise contract_error(plugin, f"gives a different result {condition}: {one_line(error)}") from error
