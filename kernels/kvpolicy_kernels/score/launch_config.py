"""How a pass over the entries is cut into programs, and what passes accept."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import UnsupportedInputError, interpreting, require
from kvpolicy_kernels.score.tile import Tile, WindowUse
from kvpolicy_kernels.score.window_queries import Window, power_of_two

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_REGIONS = ("all", "candidates")
_GROUPINGS = ("none", "mean", "max", "sum")  # by the number that kernels know them by
_BUSY = 528  # programs that an H200 runs at a time: 4 on each of its 132 multiprocessors
_MOST_BLOCKS = 16  # of one program
_WIDEST = 256  # head dim
_MOST_QUERIES = 512  # GP·WP: logits of one block of entries stay in registers
_SHARED = 96 * 1024  # bytes of shared memory that every GPU from sm_80 on has, with some to spare
_MOST_SHARED = 160 * 1024  # what a datacentre GPU has


@attrs.frozen
class Pass:
    """What a pass over keys is compiled for, beside its types."""

    block: int  # entries at a time
    warps: int
    stages: int
    shared: int  # bytes of shared memory for queries and keys

    @classmethod
    def of(cls, queries: int, dim: int, size: int, *, held: bool, widest: int) -> "Pass":
        """For GP·WP `queries` (0: none) and keys of `dim` elements of `size` bytes.

        `held` when registers hold them, not the tensor cores alone; beyond `widest` queries blocks are smaller.
        """
        row = dim_of(dim) * size
        block = 64 if held or queries > widest else 128
        warps = 16 if queries > 128 else 8 if queries > 64 or row > 512 else 4
        stages = 2 if held or (queries + 3 * block) * row > _SHARED else 3
        return cls(block, warps, stages, (queries + stages * block) * row)

    def cut(self, count: int, longest: int) -> tuple[int, int]:
        """Entries of one program, and programs per segment."""
        blocks = max(1, -(-longest // self.block))
        most = min(_MOST_BLOCKS, max(1, (blocks * count + _BUSY // 2) // _BUSY))
        splits = -(-blocks // most)
        return -(-blocks // splits) * self.block, splits

    def programs(self, lengths: Sequence[int], longest: int) -> list[int]:
        """Of each segment, the programs that find an entry."""
        span, _ = self.cut(len(lengths), longest)
        return [-(-length // span) for length in lengths]


def pass_of(window: Window | None, keys: Column | None, *, held: bool, widest: int) -> Pass:
    """For the queries of `window`, if any, and `keys`, if they are read; the rest as in `Pass.of`."""
    _, group, width = geometry_of(window)
    dim, size = (1, 1) if keys is None else (keys.width, keys.dtype.itemsize)
    return Pass.of(0 if window is None else group * width, dim, size, held=held, widest=widest)


def geometry_of(window: Window | None) -> tuple[int, int, int]:
    """G, GP and WP."""
    return (1, 1, 1) if window is None else (window.group, *window.queries.shape[1:3])


def dim_of(width: int) -> int:
    """Elements that a row of `width` is padded to in registers: what tensor cores take at least is 16."""
    return max(16, power_of_two(width))


def uses_of(tiles: Sequence[Tile]) -> list[WindowUse]:
    """The distinct uses of the window."""
    return list(dict.fromkeys(tile.window for tile in tiles if tile.window is not None))


def functions_of(tiles: Sequence[Tile]) -> list[Any]:
    """The distinct statistics."""
    return list(dict.fromkeys(tile.statistic for tile in tiles if tile.statistic is not None))


def use_options(use: WindowUse, group: int, width: int) -> tuple[int, int, int, int, int]:
    """A use of a window of GP times WP as kernels are told; last, how many rows of logits it has."""
    how = _GROUPINGS.index(use.group)
    return use.queries, _REGIONS.index(use.region), int(use.causal), how, width if how else group * width


def key_of(functions: Sequence[Any]) -> str:
    """The sources of functions: Triton's cache on disk knows a function in a tuple by its name only."""
    return "-".join(getattr(one, "cache_key", one.__name__) for one in functions)


def check_segments(segments: Segments, sinks: int, recent: int) -> None:
    """Refuses segments that kernels cannot address.

    Raises:
        UnsupportedInputError: naming what is wrong.
    """
    starts, lengths = segments.starts, segments.lengths
    require(starts.dtype == torch.int64 and lengths.dtype == torch.int32, "starts must be int64 and lengths int32")
    require(starts.shape == lengths.shape == (segments.count,), "starts and lengths must be [P]")
    require(starts.is_contiguous() and lengths.is_contiguous(), "starts and lengths must be contiguous")
    require(starts.device.type == "cuda" or interpreting(), f"no Triton on {starts.device.type}")
    require(lengths.device == starts.device, "starts and lengths are on different devices")
    require(segments.count > 0 and 0 < segments.longest < 2**30, "nothing to do, or too much for 32 bits")
    require(sinks >= 0 and recent >= 0, "sinks and recent must not be negative")


def check_column(
    columns: Mapping[str, Column], name: str, segments: Segments, dtypes: Sequence[torch.dtype], width: int | None
) -> Column:
    """The column, if kernels can read it.

    Raises:
        UnsupportedInputError: naming the column and what is wrong.
    """
    require(name in columns, f"no column {name}")
    column = columns[name]
    require(column.dtype in dtypes, f"{name} of {column.dtype}")
    require(column.width == width if width is not None else 0 < column.width <= _WIDEST, f"{name} of {column.width}")
    require(column.addresses.shape == (segments.layers,), f"{name} of other layers")
    require(column.addresses.device == segments.starts.device, f"{name} on another device")
    return column


def check_rows(columns: Mapping[str, Column], name: str, segments: Segments) -> Column:
    """A column of floats of any width that fits into registers."""
    return check_column(columns, name, segments, _FLOATS, None)


def check_window(window: Window | None, keys: Column, segments: Segments, uses: Sequence[WindowUse]) -> Window:
    """The window, if kernels can multiply it with the keys.

    Raises:
        UnsupportedInputError: naming what is wrong.
    """
    if window is None:
        raise UnsupportedInputError("a score reads the window, and there is none")
    count, group, width, dim = window.queries.shape
    rows = segments.layers * segments.rows
    require(count == segments.count and window.positions.shape == (rows, width), "the window has other segments")
    require(dim == keys.width and window.queries.dtype == keys.dtype, "queries differ from keys in dtype or head dim")
    require(window.queries.device == segments.starts.device, "queries are on another device")
    require(window.queries.is_contiguous() and window.positions.is_contiguous(), "the window is not contiguous")
    require(group * width <= _MOST_QUERIES, f"a window of {group * width} queries per KV head")
    shared = Pass.of(group * width, dim, keys.dtype.itemsize, held=True, widest=0).shared
    require(shared <= _MOST_SHARED, f"a window of {group * width} queries of {dim} elements")
    known = all(use.region in _REGIONS and use.group in _GROUPINGS and use.queries > 0 for use in uses)
    require(known, "an unknown use of the window")
    return window


def check_output(out: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Refuses an output of another shape, dtype or device, or with gaps.

    Raises:
        UnsupportedInputError: naming the output.
    """
    fits = tuple(out.shape) == shape and out.dtype == dtype and out.device == device
    require(fits and out.is_contiguous(), f"{name} must be contiguous {dtype} {shape}")
