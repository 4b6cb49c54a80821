"""Allocators asked about given lengths or scores, with an answer to `won` that owes nothing to the product."""

import attrs
import torch

from kvpolicy.stages import AllocationRequest, JointAllocator


def shares_of(allocator, layers, budget, protected, length):
    """Entries per KV head of each layer, the protected ones included, for one sequence."""
    budget, protected = min(budget, length), min(protected, length)
    request = AllocationRequest.of_lengths(layers, budget, protected, [length])
    return tuple((allocator.allocate(request).flatten() + protected).tolist())


def counts_of(allocator, scores, candidates, budget):
    """Candidates to keep per head [B, K], of one layer [B, K, T]; `budget` [B]."""
    return joint_counts(allocator, [scores], [candidates], budget)[0]


def joint_counts(allocator, scores, candidates, budget):
    """The same of several layers, [L, B, K]; a joint allocator divides `budget` [B] between them, others each."""
    room = torch.stack([inside.sum(-1) for inside in candidates])
    jointly = isinstance(allocator, JointAllocator)
    total = budget.minimum(room.sum((0, 2))) if jointly else budget[None].minimum(room.sum(-1))

    def won(best):
        if jointly:
            return owners(scores, candidates, best)
        layers = zip(scores, candidates, best, strict=True)
        return torch.cat([owners([own], [inside], count) for own, inside, count in layers])

    request = AllocationRequest(room, total, torch.zeros_like(room), torch.full_like(budget, scores[0].shape[-1]), won)
    if allocator.reads_scores:
        shown = tuple(own.masked_fill(~inside, -torch.inf) for own, inside in zip(scores, candidates, strict=True))
        request = attrs.evolve(request, scores=shown, candidates=tuple(candidates))
    return allocator.allocate(request)


def owners(scores, candidates, best):
    """How many of a row's best candidates each head owns, [L, B, K]: NaN last, ties by layer, head and slot."""
    worth = torch.stack(
        [
            own.double().nan_to_num(nan=-1e301, posinf=1e300, neginf=-1e300).masked_fill(~inside, -1e302)
            for own, inside in zip(scores, candidates, strict=True)
        ]
    )
    layers, rows, heads, slots = worth.shape
    order = worth.transpose(0, 1).flatten(1).argsort(dim=-1, descending=True, stable=True) // slots
    counted = [torch.bincount(order[row, :count], minlength=layers * heads) for row, count in enumerate(best.tolist())]
    return torch.stack(counted).view(rows, layers, heads).transpose(0, 1)
