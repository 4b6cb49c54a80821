"""Attention of one query per row over what is held: its launcher, its guard, and the bytes that it moves."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.attention.combine import combine
from kvpolicy_kernels.attention.kv_input import Export, Half, Held, Unpacking, check_attention
from kvpolicy_kernels.attention.split import attend
from kvpolicy_kernels.attention.split_plan import MASS_BLOCK, Division
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
    held: Held,
    scaling: float,
    *,
    seen: Tensor | None = None,
    slots: Tensor | None = None,
    export: Export | None = None,
    out: Tensor | None = None,
    division: Division | None = None,
) -> Tensor:
    """Softmax attention of one query per row, grouped by KV head (Flash-Decoding; arXiv:2205.14135 per split).

    Args:
        queries: [P, G, D] float32, bfloat16 or float16, as keys and values are; G up to 64, D up to 256.
        held: what is attended to; of `positions` those from 0 to `seen`.
        scaling: factor on q·k, in natural units.
        seen: [rows] int32 or int64, position of the query of each row; -1 sees nothing. Needed with `held.positions`.
        slots: [P, n] int32 or int64, attend to these slots of each segment only; -1 = none.
        export: logits and attention mass to be written in the same pass.
        out: [P, G, Dv], to be written to.
        division: how the work is divided; by default so that it fills the GPU.

    Returns:
        [P, G, Dv] in the dtype of the queries; zeros for a query that sees nothing.

    Raises:
        UnsupportedInputError: the kernel cannot do this; nothing was written.
    """
    export = export or Export()
    check_attention(queries, held, seen, slots, export)
    count, group, _ = queries.shape
    width = held.values.column.width
    out = queries.new_empty(count, group, width) if out is None else out
    require(out.shape == (count, group, width) and out.dtype == queries.dtype, "output has another shape or dtype")
    require(out.is_contiguous() and out.device == queries.device, "output is not contiguous, or elsewhere")
    if not count:
        return out
    longest = held.segments.longest if slots is None else slots.shape[1]
    if division is None:
        division = _divided(queries, held, longest, listed=slots is not None)
    _launch(queries, held, scaling, seen, slots, export, out, division, longest)
    return out


def _launch(
    queries: Tensor,
    held: Held,
    scaling: float,
    seen: Tensor | None,
    slots: Tensor | None,
    export: Export,
    out: Tensor,
    division: Division,
    longest: int,
) -> None:
    (count, group, dim), width, splits = queries.shape, out.shape[2], division.splits
    single, mass = splits == 1, export.mass is not None
    numbers = functools.partial(torch.empty, dtype=torch.float32, device=queries.device)
    logits = numbers(count, group, longest) if mass and export.logits is None else export.logits
    peaks, sums = (None, None) if single and not mass else numbers(2, count, splits, group)
    partial = None if single else numbers(count, splits, group, width)
    listed = 0 if slots is None else slots.shape[1]
    segments, common = held.segments, _common(queries, held)
    attend[count, splits](
        queries, segments.starts, segments.lengths, *_half(held.keys), *_half(held.values),
        _addresses(held.positions), seen, _addresses(held.votes), slots, logits, peaks, sums, partial, out,
        scaling, listed, longest, division.item,
        **common, **format_constants("KEY", _how(held.keys), segments.heads),
        **format_constants("VALUE", _how(held.values), segments.heads),
        HEADS=segments.heads, D=dim, DP=_padded(dim), BLOCK=division.block,
        TRIPS=division.item // division.block if interpreting() else None, num_warps=division.warps, num_stages=3,
    )  # fmt: skip
    if single and not mass:
        return
    blocks = -(-longest // MASS_BLOCK) if mass else 0
    combine[count, (0 if single else group) + blocks](
        peaks, sums, partial, out, segments.lengths, segments.starts, slots, logits if mass else None,
        _addresses(held.votes) if mass else None, _addresses(export.mass), listed, longest, division.item, splits,
        **common, SPLITS=triton.next_power_of_2(splits), BLOCK=MASS_BLOCK, num_warps=4,
    )  # fmt: skip


def _divided(queries: Tensor, held: Held, longest: int, *, listed: bool) -> Division:
    row = _padded(max(queries.shape[2], held.values.column.width)) * queries.element_size()
    entries = queries.shape[0] * longest if listed or held.entries is None else held.entries
    packed = held.keys.packed is not None or held.values.packed is not None
    return Division.of(row, longest, entries, _processors(queries.device), packed=packed)


def _common(queries: Tensor, held: Held) -> dict[str, Any]:
    group, width = queries.shape[1], held.values.column.width
    return {
        "DTYPE": TYPES[queries.dtype],
        "PER_LAYER": held.segments.per_layer,
        "G": group,
        "GP": _padded(group),
        "DV": width,
        "DVP": _padded(width),
        "UPCAST": interpreting(),
    }


def _padded(count: int) -> int:
    """What a dot product takes: a power of two, 16 at least."""
    return max(16, 1 << (count - 1).bit_length())


def _addresses(column: Column | None) -> Tensor | None:
    return None if column is None else column.addresses


def _half(half: Half) -> tuple[Any, ...]:
    """The run-time arguments of the keys or the values."""
    plain = half.column.addresses, half.starts
    if half.packed is None:
        return *plain, None, None
    packed = half.packed
    return *plain, tuple(column.addresses for column in packed.columns), (packed.starts, packed.units)


def _how(half: Half) -> Unpacking | None:
    return None if half.packed is None else half.packed.unpacking


def format_constants(name: str, how: Unpacking | None, heads: int) -> dict[str, Any]:
    """The constants of the keys or the values ("KEY", "VALUE") of so many KV heads a row."""
    if how is None:
        return {f"{name}_FORMAT": ((), (), 1, (), 1), f"{name}_TILE": None}
    types, widths = zip(*((TYPES[one.dtype], one.width) for one in how.columns), strict=True)
    options = tuple(map(tl.constexpr, how.options))  # Triton 3.6 hands no plain integers of a tuple on to a function
    return {
        f"{name}_FORMAT": (types, widths, how.unit, options, heads if how.joint else 1),
        f"{name}_TILE": how.function,
    }


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
