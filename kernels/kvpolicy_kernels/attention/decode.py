"""Decode attention, one query per row: the launcher of its two kernels, `decode_split` and `combine_splits`.

Reference: tests/kernels/references/decode.py.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.attention.combine_splits import combine_splits
from kvpolicy_kernels.attention.decode_split import decode_split
from kvpolicy_kernels.attention.kv_input import ExtraOutputs, KVInput, KVTensorInput, Unpacking, check_decode_inputs
from kvpolicy_kernels.attention.split_plan import MASS_BLOCK, SplitPlan
from kvpolicy_kernels.common.segments import Column
from kvpolicy_kernels.common.support import interpreting, require

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
    torch.int32: tl.int32,
}


def decode(
    queries: Tensor,
    kv: KVInput,
    scaling: float,
    *,
    query_positions: Tensor | None = None,
    slots: Tensor | None = None,
    extra: ExtraOutputs | None = None,
    out: Tensor | None = None,
    plan: SplitPlan | None = None,
) -> Tensor:
    """Softmax attention of one query per row, grouped by KV head (Flash-Decoding; arXiv:2205.14135 per split).

    Args:
        queries: [P, G, D] float32, bfloat16 or float16, the dtype of keys and values; G up to 64, D up to 256.
        kv: keys, values, positions and votes. With `kv.positions` a query sees positions from 0 to its own.
        scaling: factor on q·k.
        query_positions: [rows] int32 or int64, position of the query of each row; -1 sees nothing. Required with
            `kv.positions`.
        slots: [P, n] int32 or int64, the slots of each segment to attend to; -1 = none. By default all.
        extra: logits and attention mass to write in the same pass.
        out: [P, G, Dv] contiguous, written in place.
        plan: how the work is split; by default so that it fills the GPU.

    Returns:
        [P, G, Dv] in the dtype of the queries; zeros for a query that sees nothing.

    Raises:
        UnsupportedInputError: the kernels do not support these inputs; nothing was written.
    """
    extra = extra or ExtraOutputs()
    check_decode_inputs(queries, kv, query_positions, slots, extra)
    count, group, _ = queries.shape
    width = kv.values.column.width
    out = queries.new_empty(count, group, width) if out is None else out
    require(out.shape == (count, group, width) and out.dtype == queries.dtype, "output has another shape or dtype")
    require(out.is_contiguous() and out.device == queries.device, "output is not contiguous, or elsewhere")
    if not count:
        return out
    longest = kv.segments.longest if slots is None else slots.shape[1]
    if plan is None:
        plan = _default_plan(queries, kv, longest, listed=slots is not None)
    _launch(queries, kv, scaling, query_positions, slots, extra, out, plan, longest)
    return out


def _launch(
    queries: Tensor,
    kv: KVInput,
    scaling: float,
    query_positions: Tensor | None,
    slots: Tensor | None,
    extra: ExtraOutputs,
    out: Tensor,
    plan: SplitPlan,
    longest: int,
) -> None:
    (count, group, dim), width, splits = queries.shape, out.shape[2], plan.num_splits
    single, mass = splits == 1, extra.mass is not None
    empty = functools.partial(torch.empty, dtype=torch.float32, device=queries.device)
    logits = empty(count, group, longest) if mass and extra.logits is None else extra.logits
    maxima, sums = (None, None) if single and not mass else empty(2, count, splits, group)
    partial = None if single else empty(count, splits, group, width)
    listed = 0 if slots is None else slots.shape[1]
    segments, common = kv.segments, _common_constants(queries, kv)
    decode_split[count, splits](
        queries, segments.starts, segments.lengths, *_tensor_arguments(kv.keys), *_tensor_arguments(kv.values),
        _addresses(kv.positions), query_positions, _addresses(kv.votes), slots, logits, maxima, sums, partial, out,
        scaling, listed, longest, plan.split_size,
        **common, **format_constants("KEY", _unpacking(kv.keys), segments.heads),
        **format_constants("VALUE", _unpacking(kv.values), segments.heads),
        HEADS=segments.heads, D=dim, DP=_padded(dim), BLOCK=plan.block,
        TRIPS=plan.split_size // plan.block if interpreting() else None, num_warps=plan.warps, num_stages=3,
    )  # fmt: skip
    if single and not mass:
        return
    blocks = -(-longest // MASS_BLOCK) if mass else 0
    combine_splits[count, (0 if single else group) + blocks](
        maxima, sums, partial, out, segments.lengths, segments.starts, slots, logits if mass else None,
        _addresses(kv.votes) if mass else None, _addresses(extra.mass), listed, longest, plan.split_size, splits,
        **common, SPLITS=triton.next_power_of_2(splits), BLOCK=MASS_BLOCK, num_warps=4,
    )  # fmt: skip


def _default_plan(queries: Tensor, kv: KVInput, longest: int, *, listed: bool) -> SplitPlan:
    row_bytes = _padded(max(queries.shape[2], kv.values.column.width)) * queries.element_size()
    entries = queries.shape[0] * longest if listed or kv.entries is None else kv.entries
    packed = kv.keys.packed is not None or kv.values.packed is not None
    return SplitPlan.of(row_bytes, longest, entries, _processors(queries.device), packed=packed)


def _common_constants(queries: Tensor, kv: KVInput) -> dict[str, Any]:
    group, width = queries.shape[1], kv.values.column.width
    return {
        "DTYPE": TYPES[queries.dtype],
        "PER_LAYER": kv.segments.per_layer,
        "G": group,
        "GP": _padded(group),
        "DV": width,
        "DVP": _padded(width),
        "UPCAST": interpreting(),
    }


def _padded(count: int) -> int:
    """Next power of two, at least 16: the smallest operand of `tl.dot`."""
    return max(16, 1 << (count - 1).bit_length())


def _addresses(column: Column | None) -> Tensor | None:
    return None if column is None else column.addresses


def _tensor_arguments(tensor_input: KVTensorInput) -> tuple[Any, ...]:
    """The run-time arguments of the keys or the values."""
    residual, packed = (tensor_input.column.addresses, tensor_input.starts), tensor_input.packed
    if packed is None:
        return *residual, None, None
    return *residual, tuple(column.addresses for column in packed.columns), (packed.starts, packed.groups)


def _unpacking(tensor_input: KVTensorInput) -> Unpacking | None:
    return None if tensor_input.packed is None else tensor_input.packed.unpacking


def format_constants(name: str, unpacking: Unpacking | None, heads: int) -> dict[str, Any]:
    """The constants of the keys or the values (`name` is "KEY" or "VALUE"), for `heads` KV heads per row."""
    if unpacking is None:
        return {f"{name}_FORMAT": ((), (), 1, (), 1), f"{name}_TILE": None}
    types, widths = zip(*((TYPES[column.dtype], column.width) for column in unpacking.columns), strict=True)
    options = tuple(map(tl.constexpr, unpacking.options))  # Triton 3.6 passes no plain integers of a nested tuple on
    return {
        f"{name}_FORMAT": (types, widths, unpacking.group_size, options, heads if unpacking.joint else 1),
        f"{name}_TILE": unpacking.function,
    }


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
