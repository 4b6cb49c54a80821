"""Allocators: every budget is spent exactly, and on entries that exist."""

import itertools
import math
from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor

from kvpolicy.stages.checks import check_tensor, contract_error
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.samples import sample_view
from kvpolicy.stages.contracts import AllocationRequest, Allocator, JointAllocator, LayerAllocator
from kvpolicy.stages.untouched import untouched


def spends_the_whole_budget(allocator: Allocator, _promises: Promises) -> None:
    for request in _requests(allocator):
        counts = _checked(allocator, request)
        spent = counts.sum((0, 2)) if request.total.ndim == 1 else counts.sum(-1)
        if not torch.equal(spent, request.total):
            raise contract_error(allocator, f"gave {spent.tolist()} candidates, expected {request.total.tolist()}")


def gives_no_more_than_there_is(allocator: Allocator, _promises: Promises) -> None:
    for request in _requests(allocator):
        counts, room = _checked(allocator, request), request.room
        if (counts < 0).any() or (counts > room).any():
            raise contract_error(allocator, f"gave {counts.tolist()}, expected from 0 to {room.tolist()} candidates")


def divides_by_length_only_if_it_says_so(allocator: Allocator, _promises: Promises) -> None:
    """What does not follow from the length is asked for once, not for every token."""
    if not isinstance(allocator, LayerAllocator) or allocator.follows_length:
        return
    for layers, budget in ((1, 8), (7, 9), (32, 333)):
        near, far = (
            allocator.allocate(AllocationRequest.of_lengths(layers, budget, 3, [tokens])) for tokens in (budget, 4096)
        )
        if not torch.equal(near, far):
            raise contract_error(allocator, f"gave {far.tolist()} for another length, expected {near.tolist()}")


def keeps_heads_even(allocator: Allocator, _promises: Promises) -> None:
    """A layer that is not ragged has one length for all heads."""
    if allocator.ragged or isinstance(allocator, LayerAllocator):
        return
    scores, candidates = torch.arange(24, dtype=torch.float32).reshape(1, 3, 8), torch.ones(1, 3, 8, dtype=torch.bool)
    layers, room = [(scores, candidates)], torch.full((1, 1, 3), 8)
    total = torch.tensor([15]) if isinstance(allocator, JointAllocator) else torch.tensor([[15]])
    counts = allocator.allocate(_shown(allocator, layers, room, total, torch.zeros_like(room), torch.tensor([8])))
    if counts.tolist() != [[[5, 5, 5]]]:
        raise contract_error(allocator, f"gave {counts.tolist()}, expected 5 for each head: ragged is False")


def keeps_rows_apart(allocator: Allocator, _promises: Promises) -> None:
    for request in _requests(allocator):
        everything = _checked(allocator, request)
        for row in range(len(request.tokens)):
            part = slice(row, row + 1)
            alone = allocator.allocate(_rows_of(request, part))
            if not torch.equal(alone, everything[:, part]):
                raise contract_error(
                    allocator, f"gave a row alone {alone.tolist()}, expected {everything[:, part].tolist()}"
                )


def keeps_layers_apart(allocator: Allocator, _promises: Promises) -> None:
    if isinstance(allocator, (LayerAllocator, JointAllocator)):
        return
    for request in _requests(allocator):
        everything = _checked(allocator, request)
        for layer in range(len(request.room)):
            alone = allocator.allocate(_layer_of(request, layer))
            if not torch.equal(alone, everything[layer : layer + 1]):
                raise contract_error(
                    allocator, f"gave a layer alone {alone.tolist()}, expected {everything[layer].tolist()}"
                )


def leaves_its_input_alone(allocator: Allocator, _promises: Promises) -> None:
    for request in _requests(allocator):
        with untouched(allocator, request.tensors()):
            allocator.allocate(request)


def _checked(allocator: Allocator, request: AllocationRequest) -> Tensor:
    sizes = dict(zip(("layers", "batch", "kv_heads"), request.room.shape, strict=True))
    return check_tensor(allocator, allocator.allocate(request), sizes, torch.int64, request.room.device)


# -- samples ---------------------------------------------------------------------------------------------------------

_Layers = Sequence[tuple[Tensor, Tensor]]  # scores and candidates of each layer, [B, K, T]


def _requests(allocator: Allocator) -> list[AllocationRequest]:
    if isinstance(allocator, LayerAllocator):
        return _of_lengths()
    return _of_scores(allocator)


def _of_lengths() -> list[AllocationRequest]:
    shapes = itertools.product((1, 2, 7, 32), (8, 9, 64, 333), (8, 65, 100, 4096), (0, 3, 8))
    return [
        AllocationRequest.of_lengths(layers, min(budget, tokens), min(protected, tokens), [tokens])
        for layers, budget, tokens, protected in shapes
    ]


def _of_scores(allocator: Allocator) -> list[AllocationRequest]:
    """Scores that are ordinary, all equal, or have infinities and NaN; budgets from 0 to too many."""
    view = sample_view()
    ordinary, candidates = view.keys.square().sum(-1), view.candidates
    wild = ordinary.clone()
    wild[..., 2::5], wild[..., 3::5], wild[..., 4::7] = torch.inf, -torch.inf, torch.nan
    room, protected = candidates.sum(-1), view.protected.sum(-1)
    tokens = view.positions.amax((1, 2)) + 1
    requests = []
    for first, second in ((ordinary, -ordinary), (torch.zeros_like(ordinary), wild)):
        layers = [(scores.masked_fill(~candidates, -torch.inf), candidates) for scores in (first, second)]
        rooms, kept = torch.stack([room, room]), torch.stack([protected, protected])
        for budget in ((0, 1, 2), (15, 16, 17), (100, 100, 100)):
            wanted = torch.tensor(budget)
            total = (2 * wanted).minimum(rooms.sum((0, 2)))
            if not isinstance(allocator, JointAllocator):
                total = torch.stack([wanted, wanted.flip(0)]).minimum(rooms.sum(-1))
            requests.append(_shown(allocator, layers, rooms, total, kept, tokens))
    return requests


def _shown(
    allocator: Allocator, layers: _Layers, room: Tensor, total: Tensor, protected: Tensor, tokens: Tensor
) -> AllocationRequest:
    """The request, with single scores only where the allocator says that it reads them."""
    won = _owners_of_all(layers) if isinstance(allocator, JointAllocator) else _owners_in_each(layers)
    request = AllocationRequest(room, total, protected, tokens, won)
    if not allocator.reads_scores:
        return request
    scores, candidates = zip(*layers, strict=True)
    return attrs.evolve(request, scores=scores, candidates=candidates)


def _owners_in_each(layers: _Layers) -> Callable[[Tensor], Tensor]:
    each = [_owners_of_all([layer]) for layer in layers]
    return lambda best: torch.cat([own(count) for own, count in zip(each, best, strict=True)])


def _owners_of_all(layers: _Layers) -> Callable[[Tensor], Tensor]:
    """How many of a row's best candidates each head owns: NaN last, ties by layer, then head, then slot."""
    rows, heads = layers[0][0].shape[:2]

    def won(best: Tensor) -> Tensor:
        counts = torch.zeros(len(layers), rows, heads, dtype=torch.int64)
        for row, count in enumerate(best.tolist()):
            for layer, head in _owners(layers, row)[:count]:
                counts[layer, row, head] += 1
        return counts

    return won


def _owners(layers: _Layers, row: int) -> list[tuple[int, int]]:
    """Layer and head of each candidate of a row, the best one first."""
    listed = [
        ((not math.isnan(score), score), (layer, head))  # NaN ranks below all numbers
        for layer, (scores, candidates) in enumerate(layers)
        for head, (line, inside) in enumerate(zip(scores[row].tolist(), candidates[row].tolist(), strict=True))
        for score, there in zip(line, inside, strict=True)
        if there
    ]
    listed.sort(key=lambda candidate: candidate[0] if candidate[0][0] else (False, 0.0), reverse=True)
    return [owner for _, owner in listed]


def _rows_of(request: AllocationRequest, part: slice) -> AllocationRequest:
    """The rows named, as if there were no others."""
    own = _selected(request, lambda tensor: tensor[part], lambda tensor: tensor[:, part])
    before, rows = request.won, len(request.tokens)

    def won(best: Tensor) -> Tensor:
        everything = torch.zeros((*best.shape[:-1], rows), dtype=torch.int64)
        everything[..., part] = best
        return before(everything)[:, part]

    return attrs.evolve(own, won=won)


def _layer_of(request: AllocationRequest, layer: int) -> AllocationRequest:
    """One layer, as if there were no other."""
    before, layers = request.won, len(request.room)
    part = slice(layer, layer + 1)

    def won(best: Tensor) -> Tensor:
        everything = torch.zeros((layers, best.shape[-1]), dtype=torch.int64)
        everything[part] = best
        return before(everything)[part]

    return attrs.evolve(
        request,
        room=request.room[part],
        total=request.total[part],
        protected=request.protected[part],
        won=won,
        scores=request.scores[part],
        candidates=request.candidates[part],
    )


def _selected(
    request: AllocationRequest, of_rows: Callable[[Tensor], Tensor], of_layers: Callable[[Tensor], Tensor]
) -> AllocationRequest:
    return attrs.evolve(
        request,
        room=of_layers(request.room),
        total=of_rows(request.total) if request.total.ndim == 1 else of_layers(request.total),
        protected=of_layers(request.protected),
        tokens=of_rows(request.tokens),
        scores=tuple(map(of_rows, request.scores)),
        candidates=tuple(map(of_rows, request.candidates)),
    )


CHECKS = (
    spends_the_whole_budget,
    divides_by_length_only_if_it_says_so,
    gives_no_more_than_there_is,
    keeps_heads_even,
    keeps_rows_apart,
    keeps_layers_apart,
    leaves_its_input_alone,
)
