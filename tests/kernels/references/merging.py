"""Merging in float64, one entry after another."""

import math

import torch
from torch import Tensor


def cosines(keys: Tensor, kept: list[int], evicted: list[int]) -> Tensor:
    """Similarities [E, N] of the rows `evicted` of [T, D] to the rows `kept`; -inf where there is nobody."""
    rows = keys.double()
    directions = rows / rows.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-6)
    found = torch.full((len(evicted), len(kept)), -torch.inf, dtype=torch.float64)
    for place, slot in enumerate(kept):
        if slot >= 0:
            found[:, place] = (directions[evicted] * directions[slot]).sum(-1)
    return found


def weighted_sums(vectors: Tensor, weights: Tensor, targets: list[int], count: int) -> Tensor:
    """[count, D] of the rows of [T, D]."""
    sums = torch.zeros(count, vectors.shape[-1], dtype=torch.float64)
    for slot, target in enumerate(targets):
        if target >= 0:
            sums[target] += float(weights[slot]) * vectors[slot].double()
    return sums


def number_sums(values: Tensor, targets: list[int], count: int) -> Tensor:
    """[count] of the numbers [T]."""
    groups = [[float(values[slot]) for slot, to in enumerate(targets) if to == target] for target in range(count)]
    return torch.tensor([math.fsum(group) for group in groups], dtype=torch.float64)


def logarithms_of_sums(values: Tensor, targets: list[int], count: int) -> Tensor:
    """[count] of the numbers [T]; -inf for nobody."""
    found = []
    for target in range(count):
        group = [float(values[slot]) for slot, to in enumerate(targets) if to == target]
        largest = max(group, default=-math.inf)
        if math.isinf(largest):
            found.append(largest)
        else:
            found.append(largest + math.log(math.fsum(math.exp(value - largest) for value in group)))
    return torch.tensor(found, dtype=torch.float64)
