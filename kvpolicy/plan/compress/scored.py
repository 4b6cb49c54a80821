"""Layers of the same rows that are compressed together, scored and selected from by the plugins' own functions."""

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Protocol

import attrs
import torch
from torch import Tensor

from kvpolicy.plan.compress.blocks import Block, blocks_of
from kvpolicy.plan.compress.finite import faults_of, is_finite
from kvpolicy.plan.compress.score import calibration_of, weighted_sum
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.stages import Allocator, SelectionRequest, View
from kvpolicy.stages.checking.returned import check_second_scores, check_tensor, seen_shape
from kvpolicy.stages.checking.untouched import tensors_of, watching
from kvpolicy.stages.ordering import highest
from kvpolicy.stages.slots import indices_of


class Selection(Protocol):
    """Which entries of some layers stay."""

    @property
    def lengths(self) -> Tensor:
        """How many stay in each head, int64 [L, B, K]."""

    def indices(self, widths: Sequence[int]) -> list[Tensor]:
        """Keep indices of each layer, [B, K, N] int64, ascending, -1 behind a head's last one; N is its width."""


@attrs.frozen(eq=False)
class Masks:
    """A selection told by masks over the slots."""

    blocks: Sequence[Block]
    stays: Sequence[Tensor]  # bool [layers · B, K, T], one a block

    @property
    def lengths(self) -> Tensor:
        return torch.cat([block.by_layer(mask.sum(-1)) for block, mask in zip(self.blocks, self.stays, strict=True)])

    def indices(self, widths: Sequence[int]) -> list[Tensor]:
        rest, kept = iter(widths), list[Tensor]()
        for block, mask in zip(self.blocks, self.stays, strict=True):
            own = list(islice(rest, block.layers))
            layers = block.split(indices_of(mask, max(own)))
            kept += [slots[..., :width] for slots, width in zip(layers, own, strict=True)]
        return kept


class ScoredLayers:
    """L layers with the same B rows and K heads. All of it stays on the device: the host is not made to wait."""

    # Scores of each layer, float32 [B, K, T]: -inf outside the candidates, and where a candidate's was NaN.
    scores: list[Tensor]
    block_scores: list[Tensor]  # the same numbers, [layers · B, K, T] of each block
    nan: Tensor  # int64 [L, B], how many of a row's candidates had NaN
    room: Tensor  # int64 [L, B, K], candidates of each head
    protected: Tensor  # int64 [L, B, K]
    faults: Tensor  # int64 [L], slots and queries that are not finite; 0 until they are looked for

    def __init__(self, spec: PolicySpec, views: Sequence[View]) -> None:
        self.spec, self.views = spec, tuple(views)
        self.faults = torch.zeros(len(views), dtype=torch.int64, device=views[0].positions.device)
        self.observed: list[dict[str, Tensor]] = [{} for _ in views]  # new slot state, named as in the store
        self.blocks = self.shown()
        self.score()
        self.second_scores = [second_scores(spec, block.view) for block in self.blocks]
        self.statistics = _statistics(spec.allocate.divider, views)

    def shown(self) -> tuple[Block, ...]:
        """The layers as plugins are shown them."""
        return blocks_of(self.spec, self.views)

    def score(self) -> None:
        """Set `scores`, `block_scores`, `nan`, `room` and `protected`, and fill `observed`."""
        self.block_scores, nan = [], []
        noted = iter(self.observed)
        for block in self.blocks:
            total, fresh = weighted_sum(self.spec, block.view)
            wrong = total.isnan() & block.view.candidates
            self.block_scores.append(total.masked_fill(wrong | ~block.view.candidates, -torch.inf))
            nan.append(block.by_layer(wrong.sum((1, 2))))
            own = list(islice(noted, block.layers))
            for name, values in fresh.items():
                for of_layer, part in zip(own, block.split(values), strict=True):
                    of_layer[name] = part
        pairs = zip(self.blocks, self.block_scores, strict=True)
        self.scores = [part for block, scores in pairs for part in block.split(scores)]
        self.nan = torch.cat(nan)
        self.room = torch.cat([block.by_layer(block.view.candidates.sum(-1)) for block in self.blocks])
        self.protected = torch.cat([block.by_layer(block.view.protected.sum(-1)) for block in self.blocks])

    def look_for_faults(self) -> None:
        """Set `faults`: what a merger must not see of each layer, and what is not packed."""
        queries = not self.spec.merge.moves_only
        rows = [block.by_layer(faults_of(block.view, queries=queries)) for block in self.blocks]
        self.faults = torch.cat(rows).sum(1)

    def won(self, best: Tensor) -> Tensor:
        """How many of the best `best` [L, B] candidates of a layer each of its heads owns, int64 [L, B, K]."""
        layers = zip(self.scores, self.views, best, strict=True)
        return torch.stack([best_of_all([scores], [view], count)[0] for scores, view, count in layers])

    def select(self, counts: Tensor) -> Selection:
        """The protected entries, and of each head's candidates as many as `counts` [L, B, K] says."""
        parts = counts.split([block.layers for block in self.blocks])
        blocks = zip(self.blocks, self.block_scores, parts, self.second_scores, strict=True)
        stays = [
            select(self.spec, block.view, scores, part.flatten(0, 1), second) | block.view.protected
            for block, scores, part, second in blocks
        ]
        return Masks(self.blocks, stays)

    def rank_faulty_last(self, views: Sequence[View]) -> None:
        """Of candidates whose score was NaN, let those that are not finite be evicted first.

        One NaN key makes NaN of all the scores of its head. It must not be what is kept then.
        """
        for scores, view in zip(self.scores, views, strict=True):
            sound = is_finite(view.keys) & is_finite(view.values)
            scores.masked_fill_(view.candidates & ~sound & (scores == -torch.inf), torch.nan)

    def forget_entries(self) -> None:
        """Let go of keys, values and what was observed: they may be copies, as large as the cache."""
        self.views = tuple(_without_entries(view) for view in self.views)
        self.blocks = tuple(block.mapped(_without_entries) for block in self.blocks)


def _without_entries(view: View) -> View:
    return attrs.evolve(
        view,
        keys=view.keys[..., :0].clone(),
        values=view.values[..., :0].clone(),
        queries=None,
        query_positions=None,
        attention=None,
        log_votes=None,
        slot_state={},
    )


def best_of_all(scores: Sequence[Tensor], views: Sequence[View], best: Tensor) -> Tensor:
    """How many of a row's best `best` [B] candidates in all the layers each head owns, int64 [L, B, K].

    Ties: lower layer, lower head, then earlier position.
    """
    shown = [
        (view.in_sequence(own).flatten(1), view.in_sequence(view.candidates).flatten(1))
        for own, view in zip(scores, views, strict=True)
    ]
    stays = highest(torch.cat([own for own, _ in shown], 1), torch.cat([inside for _, inside in shown], 1), best)
    sizes = [own.shape[1] for own, _ in shown]
    return torch.stack([part.view(own.shape).sum(-1) for part, own in zip(stays.split(sizes, 1), scores, strict=True)])


def _statistics(allocator: Allocator, views: Sequence[View]) -> Tensor | None:
    """What the allocator must know of each head, float32 [L, B, K]; None where it needs nothing."""
    found = []
    for view in views:
        seen = attrs.evolve(view, calibration=calibration_of(view, allocator.stage + "."))
        with watching(allocator, partial(tensors_of, seen)):
            numbers = allocator.statistics(seen)
        if numbers is not None:
            sizes = dict(zip(("batch", "kv_heads"), view.positions.shape[:2], strict=True))
            found.append(check_tensor(allocator, numbers, sizes, torch.float32, view.keys.device))
    return torch.stack(found) if found else None


def second_scores(spec: PolicySpec, view: View) -> Tensor | None:
    """What the selector must know beside the scores, float32 [B, K, T] or [B, K, n, T]; None where it is nothing."""
    with watching(spec.select, lambda: tensors_of(view)):
        scores = spec.select.second_scores(view)
    if scores is not None:
        check_second_scores(spec.select, scores, view)
    return scores


def select(spec: PolicySpec, view: View, scores: Tensor, counts: Tensor, second: Tensor | None = None) -> Tensor:
    """The candidates that stay, bool [B, K, T]; `counts` [B, K] of each head, `second` as `second_scores` gave it."""
    request = SelectionRequest.of(view, scores, counts, second)
    with watching(spec.select, request.tensors):
        chosen = spec.select.select(request)
    check_tensor(spec.select, chosen, seen_shape(view), torch.bool, scores.device)
    return view.in_slots(chosen) & view.candidates
