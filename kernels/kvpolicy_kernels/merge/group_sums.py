"""Sums over entries merged into the same kept entry. Deterministic: groups are summed in ascending order of slots.

References: `sum_by_target`, `count_by_target` and `logsumexp_by_target` in
`kvpolicy_plugins.mergers.shared.merge_groups`.
"""

from collections.abc import Iterator

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from kvpolicy_kernels.common.addressing import (
    TYPES,
    check_device,
    check_segments,
    check_tensor,
    load_rows,
    row_constants,
    segment_and_block,
    segment_pointer,
)
from kvpolicy_kernels.common.compile_spec import CompileSpec
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import require
from kvpolicy_kernels.common.traffic import Traffic

_MAX_WIDTH = 256
_UNROLL = 4  # members of a group per iteration
_ROWS = 16  # groups per program that sums vectors
_NUMBERS = 64  # groups per program that sums numbers


@attrs.frozen(eq=False)
class Groups:
    """The slots of P segments grouped by target: a sorted order with group boundaries, as in a CSR matrix."""

    order: Tensor  # [P, T] int64, slots sorted by target, ascending within a group; slots without a target last
    bounds: Tensor  # [P, N + 1] int32, where the group of each target starts in `order`, and the end of the last

    @property
    def count(self) -> int:
        """N."""
        return self.bounds.shape[1] - 1

    @classmethod
    def of(cls, targets: Tensor, count: int) -> "Groups":
        """From targets [P, T], 0 to `count` - 1 or -1 for none."""
        keys, order = targets.masked_fill(targets < 0, count).to(torch.int32).sort(dim=-1, stable=True)
        starts = torch.arange(count + 1, dtype=torch.int32, device=targets.device).expand(len(targets), -1)
        return cls(order, torch.searchsorted(keys, starts.contiguous(), out_int32=True))


@triton.jit
def _members(BOUNDS, segment, block, N, TARGETS: tl.constexpr):
    """The targets of this program and the start and end of their groups in ORDER; all [TARGETS]."""
    target = block * TARGETS + tl.arange(0, TARGETS)
    bounds = BOUNDS + segment * (N + 1) + target
    return target, tl.load(bounds, mask=target < N, other=0), tl.load(bounds + 1, mask=target < N, other=0)


@triton.jit(do_not_specialize=["T", "N", "PER_LAYER"])
def _sum_rows(ADDRESSES, STARTS, ORDER, BOUNDS, WEIGHTS, OUT, T, N, PER_LAYER, DTYPE: tl.constexpr, D: tl.constexpr,
              BLOCK_D: tl.constexpr, TARGETS: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """OUT [P, N, D]: weighted sums of the entries of each group."""
    segment, block = segment_and_block(N, TARGETS)
    target, first, end = _members(BOUNDS, segment, block, N, TARGETS)
    base = segment_pointer(ADDRESSES, STARTS, segment, PER_LAYER, DTYPE, D)
    total = tl.zeros((TARGETS, BLOCK_D), tl.float32)
    while tl.max(end - first, 0) > 0:
        for offset in tl.static_range(UNROLL):
            valid = first + offset < end
            slots = tl.load(ORDER + segment * T + first + offset, mask=valid, other=0)
            weight = tl.load(WEIGHTS + segment * T + slots, mask=valid, other=0.0)
            total += weight[:, None] * load_rows(base, slots.to(tl.int64), valid, D, BLOCK_D).to(tl.float32)
        first += UNROLL
    dims = tl.arange(0, BLOCK_D)
    pointers = OUT + (segment * N + target)[:, None] * D + dims[None, :]
    tl.store(pointers, total, mask=(target < N)[:, None] & (dims < D)[None, :])


@triton.jit
def _sum_members(values, order, first, end, shift, LOGARITHMS: tl.constexpr, UNROLL: tl.constexpr):
    """Sums [TARGETS] of the values of each group, or of e^(value - shift) if LOGARITHMS."""
    total = tl.zeros(first.shape, tl.float32)
    while tl.max(end - first, 0) > 0:
        for offset in tl.static_range(UNROLL):
            valid = first + offset < end
            slots = tl.load(order + first + offset, mask=valid, other=0)
            value = tl.load(values + slots, mask=valid, other=float("-inf") if LOGARITHMS else 0.0)
            total += tl.exp2((value - shift) * 1.4426950408889634) if LOGARITHMS else value
        first += UNROLL
    return total


@triton.jit
def _group_maximum(values, order, first, end, UNROLL: tl.constexpr):
    """Maximum of each group [TARGETS]; -inf for empty groups, unspecified with NaN."""
    maximum = tl.full(first.shape, float("-inf"), tl.float32)
    while tl.max(end - first, 0) > 0:
        for offset in tl.static_range(UNROLL):
            valid = first + offset < end
            slots = tl.load(order + first + offset, mask=valid, other=0)
            value = tl.load(values + slots, mask=valid, other=float("-inf"))
            maximum = tl.where(value > maximum, value, maximum)
        first += UNROLL
    return maximum


@triton.jit(do_not_specialize=["T", "N", "M"])
def _sum_numbers(ORDER, BOUNDS, VALUES, OUT, T, N, M, LOGARITHMS: tl.constexpr, TARGETS: tl.constexpr,
                 UNROLL: tl.constexpr):  # fmt: skip
    """OUT [P, M, N]: sums of VALUES [P, M, T] over each group, or log-sum-exps if LOGARITHMS."""
    row, block = segment_and_block(N, TARGETS)
    segment = row // M
    target, first, end = _members(BOUNDS, segment, block, N, TARGETS)
    values, order = VALUES + row * T, ORDER + segment * T
    if LOGARITHMS:
        maximum = _group_maximum(values, order, first, end, UNROLL)
        shift = tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)
        total = _sum_members(values, order, first, end, shift, LOGARITHMS, UNROLL)
        total = tl.where(total == 0.0, float("-inf"), tl.log(tl.where(total == 0.0, 1.0, total)) + shift)
    else:
        total = _sum_members(values, order, first, end, 0.0, LOGARITHMS, UNROLL)
    tl.store(OUT + row * N + target, total, mask=target < N)


def sum_rows(
    segments: Segments, column: Column, weights: Tensor, groups: Groups, *, out: Tensor | None = None
) -> Tensor:
    """Weighted sums of the entries of each group.

    Args:
        segments: P segments; every slot with a target holds an entry.
        column: bfloat16, float16 or float32 vectors of up to 256 numbers.
        weights: [P, T] float32, T = `segments.longest`.
        groups: of N targets.
        out: the result, contiguous, written in place.

    Returns:
        [P, N, D] float32; 0 for empty groups.

    Raises:
        UnsupportedInputError: the kernel does not support these inputs; nothing was written.
    """
    device, shape = column.addresses.device, (segments.count, groups.count, column.width)
    check_device(device)
    require(column.dtype in TYPES, f"vectors of {column.dtype}")
    require(1 <= column.width <= _MAX_WIDTH, f"vectors of {column.width} numbers, not 1 to {_MAX_WIDTH}")
    check_segments(segments, device)
    check_tensor("addresses", column.addresses, torch.int64, (segments.layers,), device)
    check_tensor("weights", weights, torch.float32, (segments.count, segments.longest), device)
    _check_groups(groups, segments.count, segments.longest, device)
    out = torch.empty(shape, dtype=torch.float32, device=device) if out is None else out
    check_tensor("out", out, torch.float32, shape, device)
    if out.numel():
        _sum_rows[(segments.count * cdiv(groups.count, _ROWS),)](
            *(column.addresses, segments.starts, groups.order, groups.bounds, weights, out),
            *(segments.longest, groups.count, segments.per_layer),
            **row_constants(column, TARGETS=_ROWS, UNROLL=_UNROLL),
        )
    return out


def sum_numbers(values: Tensor, groups: Groups, *, logarithms: bool, out: Tensor | None = None) -> Tensor:
    """Sums, or log-sum-exps, of the numbers of each group.

    Args:
        values: [P, M, T] float32; the M numbers of a slot go to the same group.
        groups: of N targets.
        logarithms: whether to return log-sum-exps.
        out: the result, contiguous, written in place.

    Returns:
        [P, M, N] float32; 0, or -inf for log-sum-exps, for empty groups. A logarithm of inf gives inf.

    Raises:
        UnsupportedInputError: the kernel does not support these inputs; nothing was written.
    """
    device, shape = values.device, (*values.shape[:2], groups.count)
    check_device(device)
    require(values.ndim == 3, f"values of {values.ndim} dimensions, not 3")
    check_tensor("values", values, torch.float32, tuple(values.shape), device)
    _check_groups(groups, values.shape[0], values.shape[2], device)
    out = torch.empty(shape, dtype=torch.float32, device=device) if out is None else out
    check_tensor("out", out, torch.float32, shape, device)
    if out.numel():
        _sum_numbers[(shape[0] * shape[1] * cdiv(groups.count, _NUMBERS),)](
            *(groups.order, groups.bounds, values, out, values.shape[2], groups.count, values.shape[1]),
            **_number_constants(logarithms=logarithms),
        )
    return out


def _check_groups(groups: Groups, segments: int, longest: int, device: torch.device) -> None:
    check_tensor("order", groups.order, torch.int64, (segments, longest), device)
    check_tensor("bounds", groups.bounds, torch.int32, (segments, groups.count + 1), device)


def _number_constants(*, logarithms: bool) -> dict[str, object]:
    return {"LOGARITHMS": logarithms, "TARGETS": _NUMBERS, "UNROLL": _UNROLL}


def rows_traffic(column: Column, segments: int, count: int, members: int) -> Traffic:
    """Bytes that `sum_rows` moves for `count` targets in each of P segments, with `members` slots in all groups."""
    read = {
        "vectors": members * column.width * column.dtype.itemsize,
        "weights": 4 * members,
        "order": 8 * members,
        "bounds": 8 * segments * count,
    }
    return Traffic(read, {"out": 4 * segments * count * column.width})


def numbers_traffic(segments: int, rows: int, count: int, members: int, *, logarithms: bool) -> Traffic:
    """Bytes that `sum_numbers` moves for M = `rows` numbers per slot; other arguments as for `rows_traffic`."""
    passes = 2 if logarithms else 1
    read = {
        "values": 4 * passes * rows * members,
        "order": 8 * passes * rows * members,
        "bounds": 8 * segments * rows * count,
    }
    return Traffic(read, {"out": 4 * segments * rows * count})


def compile_specs() -> Iterator[CompileSpec]:
    """The launches for bfloat16 vectors of usual head dims, for sums and for log-sum-exps of numbers."""
    for dim in (128, 64):
        tables = {"ADDRESSES": "*i64", "STARTS": "*i64", "ORDER": "*i64", "BOUNDS": "*i32"}
        tables |= {"WEIGHTS": "*fp32", "OUT": "*fp32"}
        constants = row_constants(
            Column(torch.empty(0, dtype=torch.float32), torch.bfloat16, dim, ()), TARGETS=_ROWS, UNROLL=_UNROLL
        )
        sizes = {"T": "i32", "N": "i32", "PER_LAYER": "i32"}
        yield CompileSpec(f"group_sums.rows bfloat16 D={dim}", _sum_rows, {**tables, **sizes}, constants, tuple(tables))
    for logarithms in (True, False):
        tables = {"ORDER": "*i64", "BOUNDS": "*i32", "VALUES": "*fp32", "OUT": "*fp32"}
        name = "group_sums.logarithms" if logarithms else "group_sums.numbers"
        types, constants = {**tables, "T": "i32", "N": "i32", "M": "i32"}, _number_constants(logarithms=logarithms)
        yield CompileSpec(name, _sum_numbers, types, constants, tuple(tables), wide_loads=False)
