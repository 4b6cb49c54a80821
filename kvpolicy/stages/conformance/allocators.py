"""Allocators: every budget is spent exactly, and on entries that exist."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from kvpolicy.stages.checks import check_tensor, contract_error
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.samples import sample_view
from kvpolicy.stages.contracts import HeadAllocator, LayerAllocator, LayerRequest
from kvpolicy.stages.untouched import untouched

_REQUESTS = tuple(
    LayerRequest(layers=layers, budget=budget, protected=protected, length=length)
    for layers, budget, length in itertools.product((1, 2, 7, 32), (8, 9, 64, 333), (8, 65, 100, 4096))
    for protected in (0, 3, 8)
)


def spends_the_budget_of_all_layers(allocator: LayerAllocator, _promises: Promises) -> None:
    for request in _REQUESTS:
        found = allocator.allocate(request)
        total = request.layers * min(request.budget, request.length)
        if len(found) != request.layers or not all(type(one) is int for one in found):
            raise contract_error(allocator, f"returned {found!r}, expected {request.layers} integers")
        if sum(found) != total:
            raise contract_error(allocator, f"gave {sum(found)} entries to all layers, expected {total} for {request}")


def gives_layers_what_they_can_hold(allocator: LayerAllocator, _promises: Promises) -> None:
    for request in _REQUESTS:
        found = allocator.allocate(request)
        low, high = min(request.protected, request.length), request.length
        if min(found) < low or max(found) > high:
            raise contract_error(allocator, f"gave {found}, expected entries from {low} to {high} for {request}")


def spends_the_budget_of_all_heads(allocator: HeadAllocator, _promises: Promises) -> None:
    for scores, candidates, budget in _head_samples():
        found = allocator.allocate(scores, candidates, budget)
        room = candidates.sum(-1)
        sizes = {"batch": room.shape[0], "kv_heads": room.shape[1]}
        check_tensor(allocator, found, sizes, torch.int64, scores.device)
        total = budget.minimum(room.sum(-1))
        if not torch.equal(found.sum(-1), total):
            raise contract_error(allocator, f"gave {found.sum(-1).tolist()} entries, expected {total.tolist()}")


def gives_heads_what_they_can_hold(allocator: HeadAllocator, _promises: Promises) -> None:
    for scores, candidates, budget in _head_samples():
        found, room = allocator.allocate(scores, candidates, budget), candidates.sum(-1)
        if (found < 0).any() or (found > room).any():
            raise contract_error(allocator, f"gave {found.tolist()}, expected from 0 to {room.tolist()} candidates")


def keeps_heads_even(allocator: HeadAllocator, _promises: Promises) -> None:
    """A store that is not ragged has one length for all heads."""
    if allocator.ragged:
        return
    scores = torch.arange(24, dtype=torch.float32).reshape(1, 3, 8)
    found = allocator.allocate(scores, torch.ones_like(scores, dtype=torch.bool), torch.tensor([15]))
    if found.tolist() != [[5, 5, 5]]:
        raise contract_error(allocator, f"gave {found.tolist()}, expected 5 for each head: ragged is False")


def keeps_rows_apart(allocator: HeadAllocator, _promises: Promises) -> None:
    for scores, candidates, budget in _head_samples():
        together = allocator.allocate(scores, candidates, budget)
        for row in range(len(budget)):
            part = slice(row, row + 1)
            found = allocator.allocate(scores[part], candidates[part], budget[part])
            if not torch.equal(found, together[part]):
                raise contract_error(
                    allocator, f"gave a row alone {found.tolist()}, expected {together[part].tolist()}"
                )


def divides_as_it_allocates(allocator: HeadAllocator, _promises: Promises) -> None:
    """`divide`, if offered, gives what `allocate` gives: a plan that fuses calls the one for the other."""
    for scores, candidates, budget in _head_samples():
        found = allocator.divide(candidates.sum(-1), _ownership(scores, candidates), budget)
        if isinstance(found, str):
            return
        expected = allocator.allocate(scores, candidates, budget)
        if not torch.equal(found, expected):
            raise contract_error(allocator, f"divided into {found.tolist()}, but allocates {expected.tolist()}")


def _ownership(scores: Tensor, candidates: Tensor) -> Callable[[Tensor], Tensor]:
    """How many of a row's best candidates each head owns: NaN last, ties by head, then slot."""
    worth = scores.double().nan_to_num(nan=-1e301, posinf=1e300, neginf=-1e300).masked_fill(~candidates, -1e302)
    order = worth.flatten(1).argsort(dim=-1, descending=True, stable=True) // scores.shape[-1]

    def won(best: Tensor) -> Tensor:
        owners = [order[row, :count] for row, count in enumerate(best.tolist())]
        return torch.stack([torch.bincount(one, minlength=scores.shape[1]) for one in owners])

    return won


def leaves_its_input_alone(allocator: HeadAllocator, _promises: Promises) -> None:
    for scores, candidates, budget in _head_samples():
        inputs = {"scores": scores, "candidates": candidates, "budget": budget}
        with untouched(allocator, inputs):
            allocator.allocate(scores, candidates, budget)
        room = candidates.sum(-1)
        with untouched(allocator, {"room": room, "budget": budget}):
            allocator.divide(room, _ownership(scores, candidates), budget)


def _head_samples() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Scores, candidates and budgets: ordinary, all equal, with infinities and NaN; budgets from 0 to too many."""
    view = sample_view()
    ordinary = view.keys.square().sum(-1)
    wild = ordinary.clone()
    wild[..., 2::5], wild[..., 3::5], wild[..., 4::7] = torch.inf, -torch.inf, torch.nan
    everything = [
        (scores, torch.tensor(budget))
        for scores in (ordinary, -ordinary, torch.zeros_like(ordinary), wild)
        for budget in ((0, 1, 2), (15, 16, 17), (100, 100, 100))
    ]
    return [(scores, view.candidates, budget) for scores, budget in everything]


LAYER_CHECKS = (spends_the_budget_of_all_layers, gives_layers_what_they_can_hold)
HEAD_CHECKS = (
    spends_the_budget_of_all_heads,
    gives_heads_what_they_can_hold,
    keeps_heads_even,
    keeps_rows_apart,
    divides_as_it_allocates,
    leaves_its_input_alone,
)
