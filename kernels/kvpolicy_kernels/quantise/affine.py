"""Device functions and checks of asymmetric affine quantisation (KIVI, arXiv:2402.02750)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.common.addressing import TYPES, check_device, check_tensor
from kvpolicy_kernels.common.support import require
from kvpolicy_kernels.quantise.unpack import round_to

Packed = tuple[Tensor, Tensor, Tensor]
Shape = tuple[int, ...]
_MAX_DIM = 256
_BITS = (2, 4, 8)


@triton.jit
def scale_and_minimum(x, mask, AXIS: tl.constexpr, BITS: tl.constexpr, STORED: tl.constexpr, UPCAST: tl.constexpr):
    """Scales and minima of groups along AXIS, float32 but rounded to STORED; NaN for a group with a NaN.

    scale = (maximum - minimum) / (2^BITS - 1), with the minimum already rounded. `mask` marks the numbers of a group.
    """
    LEVELS: tl.constexpr = 2.0**BITS - 1
    not_nan = mask & (tl.abs(x) <= float("inf"))
    low = tl.min(tl.where(not_nan, x, float("inf")), AXIS)
    high = tl.max(tl.where(not_nan, x, float("-inf")), AXIS)
    no_nan = tl.max((mask ^ not_nan).to(tl.int32), AXIS) == 0
    not_empty = tl.max(mask.to(tl.int32), AXIS) > 0
    low = tl.where(no_nan, tl.where(not_empty, low, 0.0), float("nan"))
    minimum = round_to(low, STORED, UPCAST).to(tl.float32)
    spread = tl.where(not_empty, high, 0.0) - minimum
    # At most half of the largest float32, so that decoding cannot overflow. NaN stays.
    spread = tl.where(spread < 0.0, 0.0, tl.where(spread > 1.7014117331926443e38, 1.7014117331926443e38, spread))
    return round_to(tl.div_rn(spread, LEVELS), STORED, UPCAST).to(tl.float32), minimum


@triton.jit
def quantise_codes(x, mask, scale, minimum, AXIS: tl.constexpr, BITS: tl.constexpr):
    """Codes of numbers, int32, rounded half to even; 0 for NaN, in groups of scale 0 and where masked out."""
    LEVELS: tl.constexpr = 2.0**BITS - 1
    divisor = tl.where(scale == 0.0, float("inf"), scale)
    code = tl.div_rn(x - tl.expand_dims(minimum, AXIS), tl.expand_dims(divisor, AXIS))
    code = tl.where(mask & (code > 0.0), tl.where(code < LEVELS, code, LEVELS), 0.0)
    return ((code + 12582912.0) - 12582912.0).to(tl.int32)


@triton.jit
def pack_codes(codes, BITS: tl.constexpr):
    """Codes [A, B, C] packed into bytes [A, B, C · BITS / 8], lowest bits first."""
    if BITS == 8:
        packed = codes
    else:
        PER_BYTE: tl.constexpr = 8 // BITS
        lanes = tl.reshape(codes, (codes.shape[0], codes.shape[1], codes.shape[2] // PER_BYTE, PER_BYTE))
        packed = tl.sum(lanes << (tl.arange(0, PER_BYTE) * BITS)[None, None, None, :], 3)
    return packed.to(tl.uint8)


@triton.jit
def unpack_codes(packed, BITS: tl.constexpr):
    """Bytes [A, B, C] unpacked to codes [A, B, C · 8 / BITS], float32."""
    codes = packed.to(tl.int32)
    if BITS < 8:
        PER_BYTE: tl.constexpr = 8 // BITS
        lanes = (codes[:, :, :, None] >> (tl.arange(0, PER_BYTE) * BITS)[None, None, None, :]) & ((1 << BITS) - 1)
        codes = tl.reshape(lanes, (codes.shape[0], codes.shape[1], codes.shape[2] * PER_BYTE))
    return codes.to(tl.float32)


def check_vectors(vectors: Tensor, bits: int, stored: torch.dtype) -> None:
    """Raise UnsupportedInputError unless vectors are [S, n, D], contiguous along D and of a supported dtype."""
    check_device(vectors.device)
    require(vectors.ndim == 3, f"vectors of {vectors.ndim} dimensions, not 3")
    require(vectors.stride(2) == 1 or vectors.shape[2] == 1, "the numbers of a vector are not contiguous")
    check_dtypes(vectors.shape[2], bits, vectors.dtype, stored)


def check_dtypes(dim: int, bits: int, *dtypes: torch.dtype) -> None:
    """Raise UnsupportedInputError for head dims, bits and dtypes that the kernels do not support."""
    require(1 <= dim <= _MAX_DIM, f"head dim {dim}, not 1 to {_MAX_DIM}")
    require(bits in _BITS, f"{bits} bits, not one of {_BITS}")
    require(all(dtype in TYPES for dtype in dtypes), f"one of {dtypes}")


def empty_packed(codes: Shape, groups: Shape, stored: torch.dtype, device: torch.device) -> Packed:
    """Uninitialised codes, scales and minima of these shapes."""
    scales, minima = (torch.empty(groups, dtype=stored, device=device) for _ in range(2))
    return torch.empty(codes, dtype=torch.uint8, device=device), scales, minima


def check_packed(packed: Packed, codes: Shape, groups: Shape, stored: torch.dtype, device: torch.device) -> None:
    """Raise UnsupportedInputError unless codes, scales and minima are contiguous and of these shapes."""
    check_tensor("codes", packed[0], torch.uint8, codes, device)
    check_tensor("scales", packed[1], stored, groups, device)
    check_tensor("minima", packed[2], stored, groups, device)
