"""Device functions that compute pointers into segments and load their rows, and the matching checks on the host."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import interpreting, require, unavailable_reason

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def row_constants(column: Column, **more: object) -> dict[str, object]:
    """The constants for `segment_pointer` and `load_rows` on a column of floats, and `more`."""
    width = max(16, next_power_of_2(column.width))
    return {"DTYPE": TYPES[column.dtype], "D": column.width, "BLOCK_D": width, **more}


def grid_of(segments: Segments, entries: int) -> tuple[int]:
    """One program per block of `entries` entries of a segment, as `segment_and_block` expects."""
    return (segments.count * cdiv(segments.longest, entries),)


def check_device(device: torch.device) -> None:
    """Raise UnsupportedInputError if kernels cannot run on `device`, unless they are interpreted."""
    require(interpreting() or not unavailable_reason(device), unavailable_reason(device))


def check_segments(segments: Segments, device: torch.device) -> None:
    """Raise UnsupportedInputError unless starts [P] are int64 and lengths [P] int32, contiguous and on `device`."""
    check_tensor("starts", segments.starts, torch.int64, (segments.count,), device)
    check_tensor("lengths", segments.lengths, torch.int32, (segments.count,), device)
    require(segments.count * max(1, segments.longest) < 1 << 62, "element offsets overflow an int64")


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise UnsupportedInputError unless the tensor is contiguous, of this dtype and shape, and on `device`."""
    valid = tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.device == device
    require(valid, f"{name} is not a contiguous {dtype} tensor of shape {list(shape)} on {device}")


@triton.jit
def segment_and_block(T, ENTRIES: tl.constexpr):
    """Segment (int64) and block of entries of this program. Neighbouring programs share a segment, for the L2 cache."""
    blocks = tl.cdiv(T, ENTRIES)
    return tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks


@triton.jit
def column_pointer(ADDRESSES, layer, DTYPE: tl.constexpr):
    """Pointer to the first element of a column of one layer. Launchers have checked that it is aligned to 16 bytes."""
    return tl.multiple_of(tl.load(ADDRESSES + layer).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def segment_pointer(ADDRESSES, STARTS, segment, PER_LAYER, DTYPE: tl.constexpr, WIDTH: tl.constexpr):
    """Pointer to the first slot of a segment, in a column of `WIDTH` elements per slot."""
    return column_pointer(ADDRESSES, segment // PER_LAYER, DTYPE) + tl.load(STARTS + segment) * WIDTH


@triton.jit
def row_pointers(base, rows, columns, WIDTH: tl.constexpr):
    """Pointers [rows, columns] into contiguous rows of `WIDTH` elements; `rows` are int64 if they may overflow."""
    return base + rows[:, None] * WIDTH + columns[None, :]


@triton.jit
def load_rows(base, rows, mask, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows [rows, PADDED]: zeros beyond `WIDTH` and where `mask` [rows] is False."""
    columns = tl.arange(0, PADDED)
    mask = mask[:, None]
    if PADDED != WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(row_pointers(base, rows, columns, WIDTH), mask=mask, other=0.0)
