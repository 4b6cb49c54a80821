"""What the decode kernel reads: keys and values, the oldest perhaps packed, and what stands beside them in a slot."""

from typing import Any

import attrs
import torch
from torch import Tensor

from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import interpreting, obstacle, require


@attrs.frozen
class PackedColumn:
    """One tensor of a packed format, as a tile function sees it."""

    width: int  # elements per unit
    dtype: torch.dtype
    shared: bool = False  # one row for all entries of a unit; else a row for each


@attrs.frozen
class Unpacking:
    """How packed entries become vectors on a GPU.

    `function` is a `@triton.jit` function, whose module imports `triton.language as tl`:

        function(COLUMNS,             # tuple of pointers, one a column, to the first unit of the segment
                 slots,               # [BLOCK] int32, of the segment
                 held,                # [BLOCK] bool: no other slot may be read
                 head,                # int32: which KV head of its row the segment is
                 D: tl.constexpr,     # head dim
                 DP: tl.constexpr,    # D rounded up to a power of two
                 RUN: tl.constexpr,   # whether the slots follow each other in whole units
                 OPTIONS: tl.constexpr)  # tuple of ints: `options`

    It returns float32 [BLOCK, DP]: zeros behind the head dim, anything finite in slots that are not held. Of a
    `shared` column it reads each row once if `RUN`, and once for every entry otherwise. A unit of a `joint` format
    holds the entries of all KV heads of a row.
    """

    function: Any
    columns: tuple[PackedColumn, ...]
    unit: int = 1
    options: tuple[int, ...] = ()
    joint: bool = False


@attrs.frozen(eq=False)
class Packed:
    """The packed entries of P segments: they come first in a segment. Of a joint format P counts rows, not heads."""

    unpacking: Unpacking
    starts: Tensor  # [P] int64, first unit in the storage of the segment's layer
    units: Tensor  # [P] int32
    columns: tuple[Column, ...]  # in the order of `unpacking.columns`


@attrs.frozen(eq=False)
class Half:
    """The keys or the values of P segments: the packed ones, then those that are held as the model gave them."""

    column: Column  # [slots, D] of what is not packed
    starts: Tensor  # [P] int64, its first slot in the storage of the segment's layer
    packed: Packed | None = None


@attrs.frozen(eq=False)
class Held:
    """Everything that a query of P segments may attend to."""

    segments: Segments  # of what a slot carries beside its key and value
    keys: Half
    values: Half
    positions: Column | None = None  # int32, -1 = empty; None = every slot holds an entry
    votes: Column | None = None  # float32: log-votes, added to the logits
    entries: int | None = None  # how many all segments hold together, if the host knows


@attrs.frozen(eq=False)
class Export:
    """What else is wanted of the same pass."""

    logits: Tensor | None = None  # [P, G, T] float32, T the longest length or list: scaled, no votes, -inf if not seen
    mass: Column | None = None  # float32, G wide: the attention that each slot receives is added to it


def check_attention(queries: Tensor, held: Held, seen: Tensor | None, slots: Tensor | None, export: Export) -> None:
    """Raise UnsupportedInputError for what the kernels cannot do."""
    require(interpreting() or not obstacle(queries.device), obstacle(queries.device))
    require(queries.dtype in (torch.float32, torch.bfloat16, torch.float16), f"no attention in {queries.dtype}")
    require(queries.ndim == 3 and queries.is_contiguous(), "queries are not contiguous [P, G, D]")
    count, group, dim = queries.shape
    segments = held.segments
    require(count == segments.count, f"{count} queries for {segments.count} segments")
    require(1 <= group <= 64, f"{group} query heads a KV head")
    require(held.keys.column.width == dim, f"keys of {held.keys.column.width} for queries of {dim}")
    for half in (held.keys, held.values):
        _check_half(half, queries, segments)
    _check_column(held.positions, torch.int32, 1, "positions")
    _check_column(held.votes, torch.float32, 1, "log-votes")
    _check_column(export.mass, torch.float32, group, "attention mass")
    if held.positions is not None:
        good = seen is not None and seen.dtype in (torch.int32, torch.int64) and seen.is_contiguous()
        require(good and seen is not None and seen.shape == (segments.rows,), "no position of the query for each row")
    if slots is not None:
        good = slots.dtype in (torch.int32, torch.int64) and slots.ndim == 2 and slots.shape[0] == count
        require(good and slots.is_contiguous(), "chosen slots are not contiguous [P, n] integers")
    if export.logits is not None:
        longest = segments.longest if slots is None else slots.shape[1]
        good = export.logits.shape == (count, group, longest) and export.logits.dtype == torch.float32
        require(good and export.logits.is_contiguous(), "logits are not contiguous float32 [P, G, T]")
    places = (segments.starts, segments.lengths, seen, slots, export.logits)
    for tensor in places:
        require(tensor is None or tensor.device == queries.device, "tensors on different devices")
    require(count * group * segments.longest < 2**62 and count < 2**31, "too many segments")


def _check_half(half: Half, queries: Tensor, segments: Segments) -> None:
    column, longest = half.column, segments.longest
    require(column.dtype == queries.dtype, f"{column.dtype} entries for {queries.dtype} queries")
    require(column.addresses.device == queries.device, "entries on another device")
    require(1 <= column.width <= 256, f"head dim {column.width}")
    require(longest * column.width < 2**31, f"{longest} entries a segment")
    if half.packed is None:
        return
    how = half.packed.unpacking
    owners = segments.count // segments.heads if how.joint else segments.count
    require(half.packed.starts.shape == half.packed.units.shape == (owners,), "packed units of other segments")
    for found, wanted in zip(half.packed.columns, how.columns, strict=True):
        require((found.dtype, found.width) == (wanted.dtype, wanted.width), "packed columns of another kind")
        require(longest // how.unit * wanted.width < 2**31, f"{longest} packed entries a segment")


def _check_column(column: Column | None, dtype: torch.dtype, width: int, name: str) -> None:
    good = column is None or (column.dtype == dtype and column.width == width)
    require(good, f"{name} are not {dtype}, {width} a slot")
