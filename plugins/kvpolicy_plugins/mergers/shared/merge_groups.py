"""Which kept entry each evicted entry is merged into, and sums over the entries merged into each kept one."""

from contextlib import suppress

import attrs
import torch
from torch import Tensor
from torch.linalg import vector_norm

from kvpolicy.stages import View
from kvpolicy.stages.slots import gather
from kvpolicy_kernels import UnsupportedInputError
from kvpolicy_plugins.mergers.shared import merge_groups_kernels
from kvpolicy_plugins.mergers.shared.nearest_by import nearest_by
from kvpolicy_plugins.shared.kernel_device import runs_kernels

_EPS = 1e-6


def to_float(vectors: Tensor) -> Tensor:
    """`vectors` in float32, or unchanged if float64."""
    return vectors if vectors.dtype == torch.float64 else vectors.float()


def kept_index(kept: Tensor, slots: int) -> Tensor:
    """Index of each slot in `kept` [B, K, N]: int64 [B, K, slots], -1 for a slot that is not kept."""
    order = torch.arange(kept.shape[-1], device=kept.device).expand_as(kept)
    index = kept.new_full((*kept.shape[:2], slots + 1), -1)  # the last column receives the padding of `kept`
    return index.scatter(-1, kept.masked_fill(kept < 0, slots), order)[..., :slots]


@attrs.frozen(eq=False)
class Groups:
    """Each kept entry with the evicted entries that are merged into it."""

    target: Tensor  # int64 [B, K, T], index in `kept` of the entry that a slot is merged into; 0 for dropped slots
    member: Tensor  # bool [B, K, T], kept or merged; the others are dropped
    merged: Tensor  # bool [B, K, N], groups of more than one entry


def groups_of(kept: Tensor, joins: Tensor, index: Tensor) -> Groups:
    """Groups of `kept` [B, K, N] and the entries that join them: `joins` bool, `index` in `kept`, [B, K, T]."""
    own_index = kept_index(kept, joins.shape[-1])
    target = torch.where(joins, index, own_index.clamp(min=0))
    merged = count_by_target(joins.float(), target, kept.shape[-1]) > 0
    return Groups(target, joins | (own_index >= 0), merged)


def evicted_of(view: View, kept: Tensor) -> Tensor:
    """Bool [B, K, T]: the entries of the view that are not in `kept` [B, K, N]."""
    return view.valid & (kept_index(kept, view.positions.shape[-1]) < 0)


def nearest(
    keys: Tensor, kept: Tensor, evicted: Tensor, *, most: int | None = None, block: int = 512
) -> tuple[Tensor, Tensor]:
    """For every evicted slot, the kept slot whose key has the largest cosine similarity.

    Args:
        keys: [B, K, T, D].
        kept: int64 [B, K, N], padded with -1.
        evicted: bool [B, K, T].
        most: no head has more evicted slots; without it the host waits for the device.
        block: evicted entries per step; at most `block` x N similarities exist at a time.

    Returns:
        The largest cosine similarity [B, K, T] (float32; float64 for float64 keys), and its index in `kept` [B, K, T]
        int64, the lowest on ties. -inf and 0 for slots that are not evicted, or if none is kept.
    """
    if runs_kernels(keys.device):
        with suppress(UnsupportedInputError):
            return merge_groups_kernels.nearest(keys, kept, evicted)
    survivors = directions(gather(keys, kept)).transpose(-1, -2)

    def cosines(slots: Tensor) -> Tensor:
        return directions(gather(keys, slots)) @ survivors

    return nearest_by(cosines, kept, evicted, survivors.dtype, most=most, block=block)


def reaches(similarity: Tensor, threshold: float) -> Tensor:
    """Whether entries are as similar as a threshold says, bool [B, K, T].

    At -1 all are: rounding may put opposite keys below it. Those with -inf, in heads without kept entries, never are.
    """
    return similarity > -torch.inf if threshold == -1 else similarity >= threshold


def directions(vectors: Tensor) -> Tensor:
    """Unit vectors [..., D], float32 or float64; shorter ones for lengths below a millionth."""
    precise = to_float(vectors)
    norms: Tensor = vector_norm(precise, dim=-1, keepdim=True)
    return precise / norms.clamp(min=_EPS)


def sum_by_target(weights: Tensor, vectors: Tensor, target: Tensor, count: int) -> Tensor:
    """Weighted sums of the vectors that have the same target, in the dtype of the weights.

    Args:
        weights: [B, K, T], zero for vectors that are not added.
        vectors: [B, K, T, D].
        target: int64 [B, K, T], from 0 to count - 1.
        count: number of targets.

    Returns:
        [B, K, count, D].
    """
    if runs_kernels(vectors.device):
        with suppress(UnsupportedInputError):
            return merge_groups_kernels.sum_by_target(weights, vectors, target, count)
    weighted = weights[..., None] * vectors.to(weights.dtype)
    sums = weighted.new_zeros(*weighted.shape[:2], max(count, 1), weighted.shape[-1])
    return sums.scatter_add_(2, target[..., None].expand_as(weighted), weighted)[:, :, :count]


def count_by_target(weights: Tensor, target: Tensor, count: int) -> Tensor:
    """Sums of the weights [B, K, T] that have the same target [B, K, T], as [B, K, count]."""
    if runs_kernels(weights.device):
        with suppress(UnsupportedInputError):
            return merge_groups_kernels.count_by_target(weights, target, count)
    sums = weights.new_zeros(*weights.shape[:2], max(count, 1))
    return sums.scatter_add_(-1, target, weights)[..., :count]


def logsumexp_by_target(values: Tensor, target: Tensor, count: int) -> Tensor:
    """Log-sum-exp of the values with the same target; -inf for targets without values.

    Args:
        values: [B, K, ..., T] float32 or float64, -inf for values that are not added.
        target: int64 [B, K, T], from 0 to count - 1; shared by the dimensions in between.
        count: number of targets.

    Returns:
        [B, K, ..., count].
    """
    if runs_kernels(values.device):
        with suppress(UnsupportedInputError):
            return merge_groups_kernels.logsumexp_by_target(values, target, count)
    between = [1] * (values.ndim - target.ndim)
    index = target.reshape(*target.shape[:2], *between, target.shape[-1]).expand_as(values)
    lowest = values.new_full((*values.shape[:-1], max(count, 1)), -torch.inf)
    largest = lowest.scatter_reduce_(-1, index, values, "amax")
    shift = largest.masked_fill(largest == -torch.inf, 0.0)
    exponentials = (values - shift.gather(-1, index)).exp_()
    return (torch.zeros_like(shift).scatter_add_(-1, index, exponentials).log_() + shift)[..., :count]
