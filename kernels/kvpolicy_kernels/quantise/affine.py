"""Numbers to codes on an even grid, and back (KIVI, arXiv:2402.02750): what kernels of quantisation share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.common.addressing import TYPES, check_device, check_tensor
from kvpolicy_kernels.common.support import require
from kvpolicy_kernels.quantise.unpack import rounded

Packed = tuple[Tensor, Tensor, Tensor]
Shape = tuple[int, ...]
_WIDEST = 256
_BITS = (2, 4, 8)


@triton.jit
def grid_of(x, there, AXIS: tl.constexpr, BITS: tl.constexpr, STORED: tl.constexpr, UPCAST: tl.constexpr):
    """Steps and minima of groups along an axis, float32 as they are when `STORED`; NaN for a group with a NaN.

    A minimum is rounded first, and the step goes from there to the maximum.
    """
    LEVELS: tl.constexpr = 2.0**BITS - 1
    number = there & (tl.abs(x) <= float("inf"))
    low = tl.min(tl.where(number, x, float("inf")), AXIS)
    high = tl.max(tl.where(number, x, float("-inf")), AXIS)
    complete = tl.max((there ^ number).to(tl.int32), AXIS) == 0
    filled = tl.max(there.to(tl.int32), AXIS) > 0
    low = tl.where(complete, tl.where(filled, low, 0.0), float("nan"))
    minimum = rounded(low, STORED, UPCAST).to(tl.float32)
    spread = tl.where(filled, high, 0.0) - minimum
    # Half of the largest number leaves room to decode. NaN stays.
    spread = tl.where(spread < 0.0, 0.0, tl.where(spread > 1.7014117331926443e38, 1.7014117331926443e38, spread))
    return rounded(tl.div_rn(spread, LEVELS), STORED, UPCAST).to(tl.float32), minimum


@triton.jit
def codes_on(x, there, step, minimum, AXIS: tl.constexpr, BITS: tl.constexpr):
    """Codes of numbers, int32, half to even; 0 for NaN, in groups of step 0 and where nothing is."""
    LEVELS: tl.constexpr = 2.0**BITS - 1
    divisor = tl.where(step == 0.0, float("inf"), step)
    place = tl.div_rn(x - tl.expand_dims(minimum, AXIS), tl.expand_dims(divisor, AXIS))
    place = tl.where(there & (place > 0.0), tl.where(place < LEVELS, place, LEVELS), 0.0)
    return ((place + 12582912.0) - 12582912.0).to(tl.int32)


@triton.jit
def packed(codes, BITS: tl.constexpr):
    """Codes [A, B, C] as bytes [A, B, C · BITS / 8], lowest bits first."""
    if BITS == 8:
        found = codes
    else:
        EACH: tl.constexpr = 8 // BITS
        lanes = tl.reshape(codes, (codes.shape[0], codes.shape[1], codes.shape[2] // EACH, EACH))
        found = tl.sum(lanes << (tl.arange(0, EACH) * BITS)[None, None, None, :], 3)
    return found.to(tl.uint8)


@triton.jit
def unpacked(found, BITS: tl.constexpr):
    """Bytes [A, B, C] as codes [A, B, C · 8 / BITS], float32."""
    codes = found.to(tl.int32)
    if BITS < 8:
        EACH: tl.constexpr = 8 // BITS
        lanes = (codes[:, :, :, None] >> (tl.arange(0, EACH) * BITS)[None, None, None, :]) & ((1 << BITS) - 1)
        codes = tl.reshape(lanes, (codes.shape[0], codes.shape[1], codes.shape[2] * EACH))
    return codes.to(tl.float32)


def check_vectors(vectors: Tensor, bits: int, stored: torch.dtype) -> None:
    """Raise UnsupportedInputError unless these vectors [S, n, D] can be quantised."""
    check_device(vectors.device)
    require(vectors.ndim == 3, f"vectors of {vectors.ndim} dimensions, not 3")
    require(vectors.stride(2) == 1 or vectors.shape[2] == 1, "the numbers of a vector are not contiguous")
    check_kinds(vectors.shape[2], bits, vectors.dtype, stored)


def check_kinds(dim: int, bits: int, *dtypes: torch.dtype) -> None:
    """Raise UnsupportedInputError for head dims, bits and dtypes that kernels do not know."""
    require(1 <= dim <= _WIDEST, f"head dim {dim}, not 1 to {_WIDEST}")
    require(bits in _BITS, f"{bits} bits, not one of {_BITS}")
    require(all(dtype in TYPES for dtype in dtypes), f"one of {dtypes}")


def room_for(codes: Shape, groups: Shape, stored: torch.dtype, device: torch.device) -> Packed:
    """Codes, scales and minima that hold nothing yet."""
    scales, minima = (torch.empty(groups, dtype=stored, device=device) for _ in range(2))
    return torch.empty(codes, dtype=torch.uint8, device=device), scales, minima


def check_packed(given: Packed, codes: Shape, groups: Shape, stored: torch.dtype, device: torch.device) -> None:
    """Raise UnsupportedInputError unless codes, scales and minima are contiguous and of these shapes."""
    check_tensor("codes", given[0], torch.uint8, codes, device)
    check_tensor("scales", given[1], stored, groups, device)
    check_tensor("minima", given[2], stored, groups, device)
