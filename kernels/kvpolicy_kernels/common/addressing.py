"""How a kernel finds the entries of a segment: `Segments` and `Column`, seen from the device."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import interpreting, obstacle, require

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def row_constants(column: Column, **more: object) -> dict[str, object]:
    """The constants that `base_of` and `rows_at` need for a column of floats, and `more`."""
    width = max(16, next_power_of_2(column.width))
    return {"DTYPE": TYPES[column.dtype], "D": column.width, "BLOCK_D": width, **more}


def grid_of(segments: Segments, entries: int) -> tuple[int]:
    """One program for `entries` entries of a segment, as `place_of` expects."""
    return (segments.count * cdiv(segments.longest, entries),)


def check_device(device: torch.device) -> None:
    """Raise UnsupportedInputError where no kernel runs, unless kernels are interpreted."""
    require(interpreting() or not obstacle(device), obstacle(device))


def check_segments(segments: Segments, device: torch.device) -> None:
    """Raise UnsupportedInputError unless the tables are what kernels expect."""
    check_tensor("starts", segments.starts, torch.int64, (segments.count,), device)
    check_tensor("lengths", segments.lengths, torch.int32, (segments.count,), device)
    require(segments.count * max(1, segments.longest) < 1 << 62, "element offsets overflow an int64")


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise UnsupportedInputError unless the tensor is contiguous, of this dtype and shape, and on `device`."""
    fits = tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.device == device
    require(fits, f"{name} is not a contiguous {dtype} tensor of shape {list(shape)} on {device}")


@triton.jit
def place_of(T, ENTRIES: tl.constexpr):
    """Segment (int64) and block of entries of this program; neighbours share a segment, and so the L2 cache."""
    blocks = tl.cdiv(T, ENTRIES)
    return tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks


@triton.jit
def base_of(ADDRESSES, STARTS, segment, PER_LAYER, DTYPE: tl.constexpr, D: tl.constexpr):
    """Pointer to the first key of a segment."""
    storage = tl.load(ADDRESSES + segment // PER_LAYER).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(storage, 16) + tl.load(STARTS + segment) * D


@triton.jit
def rows_at(base, slots, held, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys [slots, BLOCK_D], zeros where nothing is held and behind D."""
    dims = tl.arange(0, BLOCK_D)
    places = base + slots.to(tl.int64)[:, None] * D + dims[None, :]
    if D == BLOCK_D:
        return tl.load(places, mask=held[:, None], other=0.0)
    return tl.load(places, mask=held[:, None] & (dims < D)[None, :], other=0.0)
