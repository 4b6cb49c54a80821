"""Checks for allocators: budgets are spent as declared, and no head gets more candidates than it has."""

import itertools
import math
from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor

from kvpolicy.stages.checking.returned import check_tensor, contract_error
from kvpolicy.stages.checking.untouched import tensors_of, untouched
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.samples import calibration_sample, rows_of, sample_view
from kvpolicy.stages.contracts import AllocationRequest, Allocator, JointAllocator, LayerAllocator
from kvpolicy.stages.view import View


def spends_the_whole_budget(allocator: Allocator, _promises: Promises) -> None:
    for request in _requests(allocator):
        counts = _checked(allocator, request)
        spent, room = (of.sum((0, 2)) if request.total.ndim == 1 else of.sum(-1) for of in (counts, request.room))
        required = allocator.exact | (request.total == room)  # what fits stays, whoever divides
        if (spent > request.total).any() or (required & (spent != request.total)).any():
            expected = f"{'' if allocator.exact else 'at most '}{request.total.tolist()}"
            raise contract_error(allocator, f"gave {spent.tolist()} candidates of {room.tolist()}, expected {expected}")


def keeps_less_only_where_lengths_are_read(allocator: Allocator, _promises: Promises) -> None:
    """The runtime reads back how long heads are only where they may differ; layers get what follows from lengths."""
    if not allocator.exact and (isinstance(allocator, LayerAllocator) or not allocator.ragged):
        raise contract_error(allocator, "is not exact, expected that of layer allocators and where heads stay even")


def gives_no_more_than_there_is(allocator: Allocator, _promises: Promises) -> None:
    for request in _requests(allocator):
        counts, room = _checked(allocator, request), request.room
        if (counts < 0).any() or (counts > room).any():
            raise contract_error(allocator, f"gave {counts.tolist()}, expected from 0 to {room.tolist()} candidates")


def divides_by_length_only_if_it_says_so(allocator: Allocator, _promises: Promises) -> None:
    """The runtime calls allocators that do not depend on the length once, not for every token."""
    if not isinstance(allocator, LayerAllocator) or allocator.follows_length:
        return
    for layers, budget in ((1, 8), (7, 9), (32, 333)):
        near, far = (
            allocator.allocate(AllocationRequest.of_lengths(layers, budget, 3, [tokens])) for tokens in (budget, 4096)
        )
        if not torch.equal(near, far):
            raise contract_error(allocator, f"gave {far.tolist()} for another length, expected {near.tolist()}")


def keeps_heads_even(allocator: Allocator, _promises: Promises) -> None:
    """Without `ragged`, all heads of a layer have the same length."""
    if allocator.ragged or isinstance(allocator, LayerAllocator):
        return
    scores, candidates = torch.arange(24, dtype=torch.float32).reshape(1, 3, 8), torch.ones(1, 3, 8, dtype=torch.bool)
    layers, room = [(scores, candidates)], torch.full((1, 1, 3), 8)
    total = torch.tensor([15]) if isinstance(allocator, JointAllocator) else torch.tensor([[15]])
    counts = allocator.allocate(
        _build_request(allocator, layers, room, total, torch.zeros_like(room), torch.tensor([8]))
    )
    if counts.tolist() != [[[5, 5, 5]]]:
        raise contract_error(allocator, f"gave {counts.tolist()}, expected 5 for each head: ragged is False")


def keeps_rows_apart(allocator: Allocator, _promises: Promises) -> None:
    for request in _requests(allocator):
        counts = _checked(allocator, request)
        for row in range(len(request.tokens)):
            index = slice(row, row + 1)
            alone = allocator.allocate(_rows_of(request, index))
            if not torch.equal(alone, counts[:, index]):
                raise contract_error(
                    allocator, f"gave {alone.tolist()} for a row alone, expected {counts[:, index].tolist()}"
                )


def keeps_layers_apart(allocator: Allocator, _promises: Promises) -> None:
    if isinstance(allocator, (LayerAllocator, JointAllocator)):
        return
    for request in _requests(allocator):
        counts = _checked(allocator, request)
        for layer in range(len(request.room)):
            alone = allocator.allocate(_layer_of(request, layer))
            if not torch.equal(alone, counts[layer : layer + 1]):
                raise contract_error(
                    allocator, f"gave {alone.tolist()} for a layer alone, expected {counts[layer].tolist()}"
                )


def gives_statistics_of_every_head(allocator: Allocator, _promises: Promises) -> None:
    view = _shown(allocator)
    with untouched(allocator, tensors_of(view)):
        numbers = allocator.statistics(view)
    if numbers is not None:
        sizes = dict(zip(("batch", "kv_heads"), view.positions.shape[:2], strict=True))
        check_tensor(allocator, numbers, sizes, torch.float32, view.keys.device)
        for row in range(len(numbers)):
            alone = allocator.statistics(rows_of(view, [row]))
            if alone is None or not torch.allclose(alone, numbers[row : row + 1], equal_nan=True):
                raise contract_error(allocator, f"gave other statistics for row {row} alone")


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
    """Requests with finite, equal and non-finite scores, and with budgets from 0 to more than all candidates."""
    view = sample_view()
    finite, candidates = view.keys.square().sum(-1), view.candidates
    non_finite = finite.clone()
    non_finite[..., 2::5], non_finite[..., 3::5], non_finite[..., 4::7] = torch.inf, -torch.inf, torch.nan
    room, protected = candidates.sum(-1), view.protected.sum(-1)
    tokens = view.positions.amax((1, 2)) + 1
    requests = []
    for first, second in ((finite, -finite), (torch.zeros_like(finite), non_finite)):
        layers = [(scores.masked_fill(~candidates, -torch.inf), candidates) for scores in (first, second)]
        rooms, kept = torch.stack([room, room]), torch.stack([protected, protected])
        for budget in ((0, 1, 2), (15, 16, 17), (100, 100, 100)):
            wanted = torch.tensor(budget)
            total = (2 * wanted).minimum(rooms.sum((0, 2)))
            if not isinstance(allocator, JointAllocator):
                total = torch.stack([wanted, wanted.flip(0)]).minimum(rooms.sum(-1))
            requests.append(_build_request(allocator, layers, rooms, total, kept, tokens))
    return requests


def _build_request(
    allocator: Allocator, layers: _Layers, room: Tensor, total: Tensor, protected: Tensor, tokens: Tensor
) -> AllocationRequest:
    """An allocation request; it has scores only if the allocator declares that it reads them."""
    won = _owners_of_all(layers) if isinstance(allocator, JointAllocator) else _owners_in_each(layers)
    request = AllocationRequest(room, total, protected, tokens, won)
    if allocator.statistics(_shown(allocator)) is not None:
        statistics = torch.arange(1, room.numel() + 1, dtype=torch.float32).reshape(room.shape).sin().square()
        request = attrs.evolve(request, statistics=statistics)
    if not allocator.reads_scores:
        return request
    scores, candidates = zip(*layers, strict=True)
    return attrs.evolve(request, scores=scores, candidates=candidates)


def _shown(allocator: Allocator) -> View:
    """A layer, with what the allocator needs and is calibrated with."""
    calibration = allocator.calibrate([calibration_sample(0)])[0] if allocator.calibrated else {}
    return attrs.evolve(sample_view(allocator), calibration=calibration)


def _owners_in_each(layers: _Layers) -> Callable[[Tensor], Tensor]:
    owners_by_layer = [_owners_of_all([layer]) for layer in layers]
    return lambda best: torch.cat([owners(count) for owners, count in zip(owners_by_layer, best, strict=True)])


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
    """Layer and head of each candidate of a row, best first."""
    ranked = [
        ((not math.isnan(score), score), (layer, head))  # NaN ranks below all numbers
        for layer, (scores, candidates) in enumerate(layers)
        for head, (head_scores, head_candidates) in enumerate(
            zip(scores[row].tolist(), candidates[row].tolist(), strict=True)
        )
        for score, is_candidate in zip(head_scores, head_candidates, strict=True)
        if is_candidate
    ]
    ranked.sort(key=lambda candidate: candidate[0] if candidate[0][0] else (False, 0.0), reverse=True)
    return [owner for _, owner in ranked]


def _rows_of(request: AllocationRequest, rows: slice) -> AllocationRequest:
    """The request for some rows alone."""
    selected = _selected(request, lambda tensor: tensor[rows], lambda tensor: tensor[:, rows])
    won_by_all, row_count = request.won, len(request.tokens)

    def won(best: Tensor) -> Tensor:
        all_rows = torch.zeros((*best.shape[:-1], row_count), dtype=torch.int64)
        all_rows[..., rows] = best
        return won_by_all(all_rows)[:, rows]

    return attrs.evolve(selected, won=won)


def _layer_of(request: AllocationRequest, layer: int) -> AllocationRequest:
    """The request for one layer alone."""
    won_by_all, layer_count = request.won, len(request.room)
    index = slice(layer, layer + 1)

    def won(best: Tensor) -> Tensor:
        all_layers = torch.zeros((layer_count, best.shape[-1]), dtype=torch.int64)
        all_layers[index] = best
        return won_by_all(all_layers)[index]

    return attrs.evolve(
        request,
        room=request.room[index],
        total=request.total[index],
        protected=request.protected[index],
        won=won,
        scores=request.scores[index],
        candidates=request.candidates[index],
        statistics=None if request.statistics is None else request.statistics[index],
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
        statistics=None if request.statistics is None else of_layers(request.statistics),
    )


CHECKS = (
    gives_statistics_of_every_head,
    spends_the_whole_budget,
    keeps_less_only_where_lengths_are_read,
    divides_by_length_only_if_it_says_so,
    gives_no_more_than_there_is,
    keeps_heads_even,
    keeps_rows_apart,
    keeps_layers_apart,
    leaves_its_input_alone,
)
