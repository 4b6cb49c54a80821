"""Counts of candidates to keep: the allocator of a policy, asked about all layers that it divides between."""

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from kvpolicy.plan.compress.scored import ScoredLayers, best_of_all
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.stages import AllocationRequest, Allocator, JointAllocator
from kvpolicy.stages.checking.returned import check_tensor
from kvpolicy.stages.checking.untouched import watching


def allocate(
    spec: PolicySpec, groups: Sequence[ScoredLayers], budgets: Sequence[Tensor], tokens: Tensor
) -> list[Tensor]:
    """Candidates to keep in each head, int64 [L, B, K] for each group of layers.

    `budgets` are entries per KV head, int64 [L, B] for each group, and `tokens` [B] those that a row has had. A joint
    allocator is asked about all groups at once, and they must be all layers of the model.
    """
    allocator = spec.allocate.divider
    if isinstance(allocator, JointAllocator):
        counts = _allocate_jointly(allocator, groups, budgets, tokens)
        return list(counts.split([len(group.scores) for group in groups]))
    return [_allocate(allocator, group, budget, tokens) for group, budget in zip(groups, budgets, strict=True)]


def _allocate(allocator: Allocator, group: ScoredLayers, budgets: Tensor, tokens: Tensor) -> Tensor:
    free = (budgets * group.room.shape[-1] - group.protected.sum(-1)).clamp(min=0)
    total = free.minimum(group.room.sum(-1))
    return _asked(allocator, [group], AllocationRequest(group.room, total, group.protected, tokens, group.won))


def _allocate_jointly(
    allocator: Allocator, groups: Sequence[ScoredLayers], budgets: Sequence[Tensor], tokens: Tensor
) -> Tensor:
    room, protected = (
        torch.cat(each) for each in zip(*((group.room, group.protected) for group in groups), strict=True)
    )
    free = (torch.cat(list(budgets)).sum(0) * room.shape[-1] - protected.sum((0, 2))).clamp(min=0)
    scores = [scores for group in groups for scores in group.scores]
    views = [view for group in groups for view in group.views]
    total = free.minimum(room.sum((0, 2)))
    request = AllocationRequest(room, total, protected, tokens, lambda best: best_of_all(scores, views, best))
    return _asked(allocator, groups, request)


def _asked(allocator: Allocator, groups: Sequence[ScoredLayers], request: AllocationRequest) -> Tensor:
    """What the allocator answers, checked; single scores are shown where it reads them."""
    statistics = [group.statistics for group in groups if group.statistics is not None]
    if statistics:
        request = attrs.evolve(request, statistics=torch.cat(statistics))
    if allocator.reads_scores:
        pairs = [(view, scores) for group in groups for view, scores in zip(group.views, group.scores, strict=True)]
        request = attrs.evolve(
            request,
            scores=tuple(view.in_sequence(scores) for view, scores in pairs),
            candidates=tuple(view.in_sequence(view.candidates) for view, _ in pairs),
        )
    with watching(allocator, request.tensors):
        counts = allocator.allocate(request)
    sizes = dict(zip(("layers", "batch", "kv_heads"), request.room.shape, strict=True))
    return check_tensor(allocator, counts, sizes, torch.int64, request.room.device)
