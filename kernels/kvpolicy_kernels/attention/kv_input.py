"""What decode attention reads: keys and values, the oldest of which may be packed, and per-slot positions and votes."""

from typing import Any

import attrs
import torch
from torch import Tensor

from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import interpreting, require, unavailable_reason


@attrs.frozen
class PackedColumn:
    """One tensor of a packed format, as a tile function sees it."""

    width: int  # elements per group
    dtype: torch.dtype
    shared: bool = False  # one row for all entries of a group, such as a scale per channel; else one row per entry


@attrs.frozen
class Unpacking:
    """How a kernel turns packed entries into vectors.

    `function` is a `@triton.jit` function, whose module imports `triton.language as tl`:

        function(COLUMNS,             # tuple of pointers, one per column, to the first group of the segment
                 slots,               # [BLOCK] int32, slots of the segment
                 mask,                # [BLOCK] bool: which slots may be read
                 head,                # int32: index of the segment's KV head in its row
                 D: tl.constexpr,     # head dim
                 DP: tl.constexpr,    # D rounded up to a power of two
                 RUN: tl.constexpr,   # whether the slots are consecutive and cover whole groups
                 OPTIONS: tl.constexpr)  # tuple of numbers: `options`

    It returns float32 [BLOCK, DP]: zeros beyond the head dim, anything finite in slots that are masked out. Of a
    `shared` column it reads each row once if `RUN`, and once for every entry otherwise. A group of a `joint` format
    holds the entries of all KV heads of a row.
    """

    function: Any
    columns: tuple[PackedColumn, ...]
    group_size: int = 1  # entries per quantisation group
    options: tuple[float, ...] = ()
    joint: bool = False
    in_basis: bool = False  # whether vectors are in a basis of the format's own: queries and residual must be, too


@attrs.frozen(eq=False)
class PackedInput:
    """The packed entries of P segments: the first ones of each segment. Of a joint format P counts rows, not heads."""

    unpacking: Unpacking
    starts: Tensor  # [P] int64, first group in the storage of the segment's layer
    groups: Tensor  # [P] int32, how many groups the segment has
    columns: tuple[Column, ...]  # in the order of `unpacking.columns`


@attrs.frozen(eq=False)
class KVTensorInput:
    """The keys or the values of P segments: packed entries first, then the residual in the model's dtype."""

    column: Column  # [slots, D], entries that are not packed
    starts: Tensor  # [P] int64, first slot in the storage of the segment's layer
    packed: PackedInput | None = None


@attrs.frozen(eq=False)
class KVInput:
    """Everything that the queries of P segments may attend to."""

    segments: Segments  # of positions and votes; lengths count packed entries, too
    keys: KVTensorInput
    values: KVTensorInput
    positions: Column | None = None  # int32, -1 = empty slot; None = every slot below the length holds an entry
    votes: Column | None = None  # float32 log-votes, added to the logits
    entries: int | None = None  # total number of entries of all segments, if the host knows it


@attrs.frozen(eq=False)
class ExtraOutputs:
    """What decode attention writes besides its output; None = not written."""

    logits: Tensor | None = None  # [P, G, T] float32, T the longest length or list: scaled, no votes, -inf if masked
    mass: Column | None = None  # float32, G wide: the attention that each slot receives is added to it


def check_decode_inputs(
    queries: Tensor, kv: KVInput, query_positions: Tensor | None, slots: Tensor | None, extra: ExtraOutputs
) -> None:
    """Raise UnsupportedInputError for dtypes, shapes, layouts and devices that the kernels do not support."""
    require(interpreting() or not unavailable_reason(queries.device), unavailable_reason(queries.device))
    require(queries.dtype in (torch.float32, torch.bfloat16, torch.float16), f"no attention in {queries.dtype}")
    require(queries.ndim == 3 and queries.is_contiguous(), "queries are not contiguous [P, G, D]")
    count, group, dim = queries.shape
    segments = kv.segments
    require(count == segments.count, f"{count} queries for {segments.count} segments")
    require(1 <= group <= 64, f"{group} query heads a KV head")
    require(kv.keys.column.width == dim, f"keys of {kv.keys.column.width} for queries of {dim}")
    for tensor_input in (kv.keys, kv.values):
        _check_tensor_input(tensor_input, queries, segments)
    _check_column(kv.positions, torch.int32, 1, "positions")
    _check_column(kv.votes, torch.float32, 1, "log-votes")
    _check_column(extra.mass, torch.float32, group, "attention mass")
    integers = (torch.int32, torch.int64)
    if kv.positions is not None:
        valid = query_positions is not None and query_positions.dtype in integers and query_positions.is_contiguous()
        shaped = query_positions is not None and query_positions.shape == (segments.rows,)
        require(valid and shaped, "no position of the query for each row")
    if slots is not None:
        valid = slots.dtype in integers and slots.ndim == 2 and slots.shape[0] == count
        require(valid and slots.is_contiguous(), "chosen slots are not contiguous [P, n] integers")
    if extra.logits is not None:
        longest = segments.longest if slots is None else slots.shape[1]
        valid = extra.logits.shape == (count, group, longest) and extra.logits.dtype == torch.float32
        require(valid and extra.logits.is_contiguous(), "logits are not contiguous float32 [P, G, T]")
    for tensor in (segments.starts, segments.lengths, query_positions, slots, extra.logits):
        require(tensor is None or tensor.device == queries.device, "tensors on different devices")
    require(count * group * segments.longest < 2**62 and count < 2**31, "too many segments")


def _check_tensor_input(tensor_input: KVTensorInput, queries: Tensor, segments: Segments) -> None:
    column, longest, packed = tensor_input.column, segments.longest, tensor_input.packed
    require(column.dtype == queries.dtype, f"{column.dtype} entries for {queries.dtype} queries")
    require(column.addresses.device == queries.device, "entries on another device")
    require(1 <= column.width <= 256, f"head dim {column.width}")
    require(longest * column.width < 2**31, f"{longest} entries a segment")
    if packed is None:
        return
    unpacking = packed.unpacking
    owners = segments.count // segments.heads if unpacking.joint else segments.count
    require(packed.starts.shape == packed.groups.shape == (owners,), "packed groups of other segments")
    for given, declared in zip(packed.columns, unpacking.columns, strict=True):
        require((given.dtype, given.width) == (declared.dtype, declared.width), "packed columns of another kind")
        require(longest // unpacking.group_size * declared.width < 2**31, f"{longest} packed entries a segment")


def _check_column(column: Column | None, dtype: torch.dtype, width: int, name: str) -> None:
    valid = column is None or (column.dtype == dtype and column.width == width)
    require(valid, f"{name} are not {dtype}, {width} a slot")
