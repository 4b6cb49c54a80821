"""One compression of static layers: the same stages as anywhere, on all slots, without a decision of the host."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy.plan.pipeline import allocate, select, weighted_sum
from kvpolicy.plan.plan import POSITIONS, Plan
from kvpolicy.runtime.static.fused import evict_in_kernels
from kvpolicy.runtime.static.layer import StaticLayer, layers
from kvpolicy.runtime.static.slots import Slots
from kvpolicy.stages import View


def evict(static: Sequence[StaticLayer], due: Tensor, budgets: Tensor, nan: Tensor) -> None:
    """Reduce the rows that are `due` [L, B] bool to `budgets` [L, B] int64 entries per KV head; others keep everything.

    How many of the scores were NaN, and how many scores there were, is added to `nan` [2] int64.

    A compiled graph has this as one operator: plugins are anybody's Python, and need not be traceable.
    """
    if torch.compiler.is_compiling():
        tensors = [tensor for layer in static for tensor in layer.slots.tensors]
        window = [tensor for layer in static for tensor in layer.slots.window]
        _evict_op([layer.name for layer in static], [*tensors, nan], window, due, budgets)
    else:
        _evict(static, [layer.slots for layer in static], due, budgets, nan)


@torch.library.custom_op("kvpolicy::evict", mutates_args={"tensors"})
def _evict_op(names: list[int], tensors: list[Tensor], window: list[Tensor], due: Tensor, budgets: Tensor) -> None:
    *entries, nan = tensors
    count, queries = len(entries) // len(names), len(window) // len(names)
    held = [
        layers[name].slots.standing_in(entries[i * count :][:count], window[i * queries :][:queries])
        for i, name in enumerate(names)
    ]
    _evict([layers[name] for name in names], held, due, budgets, nan)


@_evict_op.register_fake
def _(*_arguments: object) -> None:
    """Nothing comes out."""


def _evict(static: Sequence[StaticLayer], held: Sequence[Slots], due: Tensor, budgets: Tensor, nan: Tensor) -> None:
    plan = static[0].plan
    views = [one.view(plan, layer.ordinal, layer.scaling) for layer, one in zip(static, held, strict=True)]
    if not evict_in_kernels(plan, held, views, due, budgets, nan):
        for one, view, rows, budget in zip(held, views, due, budgets, strict=True):
            _evict_one(plan, one, view, rows[:, None, None], budget, nan)


def _evict_one(plan: Plan, held: Slots, view: View, rows: Tensor, budget: Tensor, nan: Tensor) -> None:
    scores, observed = weighted_sum(plan.spec, view)
    stays = torch.where(rows, _chosen(plan, view, scores, budget), view.valid)
    wrong = scores.isnan() & view.candidates & rows
    nan.add_(torch.stack([wrong.sum(), (view.candidates & rows).sum()]))
    for name, fresh in observed.items():
        held.columns[name].copy_(torch.where(rows, fresh, held.columns[name]))
    _compact(held, stays)


def _chosen(plan: Plan, view: View, scores: Tensor, budget: Tensor) -> Tensor:
    """The slots that stay in rows that are due, bool [B, K, C]."""
    ranked = scores.masked_fill(scores.isnan() | ~view.candidates, -torch.inf)
    counts = allocate(plan.spec, view, ranked, budget)
    return select(plan.spec, view, ranked, counts) | view.protected


def _compact(held: Slots, stays: Tensor) -> None:
    """Move the slots that stay [B, K, C] to the front, in their order."""
    counts = stays.sum(-1)
    sources, behind = _sources(stays, counts)
    for tensor in (held.keys, held.values, *held.columns.values()):
        slots = tensor.flatten(0, 2)
        slots.copy_(slots.index_select(0, sources.flatten()))
    held.columns[POSITIONS].masked_fill_(behind, -1)
    held.lengths.copy_(counts[:, 0])


def _sources(stays: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Where each slot's new content stands, among all slots of all segments; and which slots are then behind the last.

    Those repeat the first entry: an evicted one could be NaN, and a masked slot is still multiplied.
    """
    rows, heads, capacity = stays.shape
    slots = torch.arange(capacity, device=stays.device)
    target = torch.where(stays, stays.cumsum(-1) - 1, capacity)  # what goes is written to one slot more
    order = torch.zeros((rows, heads, capacity + 1), dtype=torch.int64, device=stays.device)
    order = order.scatter_(-1, target, slots.expand_as(stays))[..., :capacity]
    behind = slots >= counts[..., None]
    order = torch.where(behind, order[..., :1], order)
    starts = torch.arange(rows * heads, device=stays.device).view(rows, heads, 1) * capacity
    return starts + order, behind
