"""Small inputs that plugins are tried on. Random, but the same in every run."""

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from kvpolicy.stages.checks import contract_error
from kvpolicy.stages.contracts import Plugin, Scorer
from kvpolicy.stages.geometry import Geometry
from kvpolicy.stages.view import View

KV_HEADS, GROUP, DIM = 2, 2, 16
LENGTHS = ((23, 23), (14, 14), (23, 9))  # alike, padded, ragged
SINKS, RECENT = 1, 3
_JUNK = 997.0  # what an empty slot may hold


def sample_view(scorer: Scorer | None = None, *, lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> View:
    """A layer of `lengths` (entries per row and head), with what `scorer` needs and the state of a new cache."""
    random = torch.Generator().manual_seed(1)
    held = torch.tensor(lengths)
    batch, heads, slots = *held.shape, int(held.max())

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

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
    return view if scorer is None else _observed(scorer, view, normal)


def _observed(scorer: Scorer, view: View, normal: Callable[..., Tensor]) -> View:
    batch, heads, slots = view.positions.shape
    needs = scorer.needs()
    queries = normal(batch, heads * GROUP, needs.queries, DIM) if needs.queries else None
    attention = normal(batch, heads, GROUP, slots).abs() if needs.attention else None
    state = {one.name: torch.full(view.positions.shape, one.fill) for one in scorer.slot_state()}
    return attrs.evolve(view, queries=queries, attention=attention, slot_state=state)


def with_junk(view: View) -> View:
    """The same layer, with other contents in its empty slots."""
    empty = ~view.valid
    attention = view.attention
    return attrs.evolve(
        view,
        keys=view.keys.masked_fill(empty[..., None], _JUNK),
        values=view.values.masked_fill(empty[..., None], _JUNK),
        attention=None if attention is None else attention.masked_fill(empty[:, :, None], _JUNK),
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
        slot_state={name: cut(state) for name, state in view.slot_state.items()},
    )


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
        slot_state={name: swapped(state) for name, state in view.slot_state.items()},
    )


def tensors_of(view: View) -> dict[str, Tensor]:
    """Everything in a view that a plugin could write to."""
    own = {name: getattr(view, name) for name in ("keys", "values", "positions", "queries", "attention")}
    own.update(view.slot_state)
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def expect_close(plugin: Plugin, found: Tensor, expected: Tensor, when: str) -> None:
    """Refuses a difference that rounding does not explain; NaN equals NaN."""
    try:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    except AssertionError as error:
        raise contract_error(plugin, f"gives something else {when}: {error}") from error


def expect_untouched(plugin: Plugin, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Refuses inputs that differ from their copies of before."""
    for name, tensor in after.items():
        if not torch.equal(before[name], tensor):
            raise contract_error(plugin, f"changed its input {name!r}, expected it to be read only")
