"""Functions of `merge_groups` in Triton kernels. They raise UnsupportedInputError where torch must run instead."""

import math

import torch
from torch import Tensor

from kvpolicy_kernels import Column, Segments
from kvpolicy_kernels.common.support import require


def nearest(keys: Tensor, kept: Tensor, evicted: Tensor) -> tuple[Tensor, Tensor]:
    """As `merge_groups.nearest`."""
    from kvpolicy_kernels.merge.nearest import nearest as launch

    slots = kept.flatten(0, 1).to(torch.int32).contiguous()
    similarity, index = launch(*_layer(keys), slots, evicted.flatten(0, 1).contiguous())
    return similarity.view(evicted.shape), index.view(evicted.shape)


def sum_by_target(weights: Tensor, vectors: Tensor, target: Tensor, count: int) -> Tensor:
    """As `merge_groups.sum_by_target`; vectors of weight 0 are skipped, even if not finite."""
    from kvpolicy_kernels.merge.group_sums import Groups, sum_rows

    require(weights.dtype == torch.float32, f"weights of {weights.dtype}")
    groups = Groups.of(target.masked_fill(weights == 0, -1).flatten(0, 1), count)
    sums = sum_rows(*_layer(vectors), weights.flatten(0, 1).contiguous(), groups)
    return sums.view(*weights.shape[:2], count, vectors.shape[-1])


def count_by_target(weights: Tensor, target: Tensor, count: int) -> Tensor:
    """As `merge_groups.count_by_target`."""
    from kvpolicy_kernels.merge.group_sums import Groups, sum_numbers

    require(weights.dtype == torch.float32, f"weights of {weights.dtype}")
    groups = Groups.of(target.masked_fill(weights == 0, -1).flatten(0, 1), count)
    sums = sum_numbers(weights.flatten(0, 1)[:, None].contiguous(), groups, logarithms=False)
    return sums.view(*weights.shape[:2], count)


def logsumexp_by_target(values: Tensor, target: Tensor, count: int) -> Tensor:
    """As `merge_groups.logsumexp_by_target`."""
    from kvpolicy_kernels.merge.group_sums import Groups, sum_numbers

    require(values.dtype == torch.float32, f"logarithms of {values.dtype}")
    numbers = values.reshape(math.prod(values.shape[:2]), math.prod(values.shape[2:-1]), values.shape[-1])
    is_empty = (numbers == -torch.inf).all(1)
    groups = Groups.of(target.flatten(0, 1).masked_fill(is_empty, -1), count)
    return sum_numbers(numbers.contiguous(), groups, logarithms=True).view(*values.shape[:-1], count)


def _layer(vectors: Tensor) -> tuple[Segments, Column]:
    """All slots of [B, K, T, D] as segments."""
    lengths = torch.full((1, *vectors.shape[:2]), vectors.shape[2], dtype=torch.int32, device=vectors.device)
    return Segments.of([vectors], lengths), Column.of([vectors])
