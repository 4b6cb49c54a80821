"""Input checks that the score, statistics and postprocessing launchers share."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import UnsupportedInputError, interpreting, require
from kvpolicy_kernels.score.launch_config import GROUP_REDUCTIONS, REGIONS, LaunchConfig
from kvpolicy_kernels.score.tile import WindowUse
from kvpolicy_kernels.score.window_queries import WindowQueries

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MAX_WIDTH = 256  # head dim
_MAX_QUERIES = 512  # GP·WP: the logits of one block of entries stay in registers
_MAX_SHARED = 160 * 1024  # bytes of shared memory that a datacentre GPU has


def check_segments(segments: Segments, sinks: int, recent: int) -> None:
    """Check segments and the numbers of protected entries.

    Raises:
        UnsupportedInputError: kernels cannot address them; names what is wrong.
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
    """The column `name`; its width must be `width`, or up to 256 if that is None.

    Raises:
        UnsupportedInputError: kernels cannot read it; names the column and what is wrong.
    """
    require(name in columns, f"no column {name}")
    column = columns[name]
    require(column.dtype in dtypes, f"{name} of {column.dtype}")
    require(column.width == width if width is not None else 0 < column.width <= _MAX_WIDTH, f"{name} of {column.width}")
    require(column.addresses.shape == (segments.layers,), f"{name} of other layers")
    require(column.addresses.device == segments.starts.device, f"{name} on another device")
    return column


def check_vectors(columns: Mapping[str, Column], name: str, segments: Segments) -> Column:
    """`check_column` for floats of any width up to 256."""
    return check_column(columns, name, segments, _FLOATS, None)


def check_window(
    window: WindowQueries | None, keys: Column, segments: Segments, uses: Sequence[WindowUse]
) -> WindowQueries:
    """The window, which must fit the keys and into registers and shared memory.

    Raises:
        UnsupportedInputError: names what is wrong.
    """
    if window is None:
        raise UnsupportedInputError("a score reads the window, and there is none")
    count, group, width, dim = window.queries.shape
    rows = segments.layers * segments.rows
    require(count == segments.count and window.positions.shape == (rows, width), "the window has other segments")
    require(dim == keys.width and window.queries.dtype == keys.dtype, "queries differ from keys in dtype or head dim")
    require(window.queries.device == segments.starts.device, "queries are on another device")
    require(window.queries.is_contiguous() and window.positions.is_contiguous(), "the window is not contiguous")
    require(group * width <= _MAX_QUERIES, f"a window of {group * width} queries per KV head")
    config = LaunchConfig.of(group * width, dim, keys.dtype.itemsize, in_registers=True, max_queries=0)
    require(config.shared <= _MAX_SHARED, f"a window of {group * width} queries of {dim} elements")
    known = all(use.region in REGIONS and use.group in GROUP_REDUCTIONS and use.queries > 0 for use in uses)
    require(known, "an unknown use of the window")
    return window


def check_output(out: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Check that `out` is contiguous and has this shape, dtype and device.

    Raises:
        UnsupportedInputError: names the output.
    """
    valid = tuple(out.shape) == shape and out.dtype == dtype and out.device == device
    require(valid and out.is_contiguous(), f"{name} must be contiguous {dtype} {shape}")
