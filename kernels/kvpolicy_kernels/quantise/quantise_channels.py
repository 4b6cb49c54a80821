"""Quantisation of each channel of some consecutive tokens (keys of KIVI, arXiv:2402.02750), packed.

References: `quantise` and `dequantise` in `kvpolicy_plugins.affine`, `pack` and `unpack` in `kvpolicy_plugins.packing`.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from kvpolicy_kernels.common.addressing import TYPES, check_device, check_tensor
from kvpolicy_kernels.common.compile_spec import Build
from kvpolicy_kernels.common.support import interpreting, require
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.quantise.affine import (
    Packed,
    check_kinds,
    check_packed,
    check_vectors,
    codes_on,
    grid_of,
    packed,
    room_for,
    unpacked,
)
from kvpolicy_kernels.quantise.unpack import rounded

_LONGEST = 256  # tokens of a unit
_NUMBERS = 4096  # of one program


@triton.jit
def _channels_at(unit, slab, UNITS, UNIT: tl.constexpr, BYTES: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
                 BLOCK: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """Tokens, channels and which of both are there, for numbers, bytes of codes and groups of one program."""
    first = tl.program_id(1) * BLOCK
    token, channel = tl.arange(0, ROWS), first + tl.arange(0, BLOCK)
    byte = first * BITS // 8 + tl.arange(0, BLOCK * BITS // 8)
    there = (token < UNIT)[:, None, None] & (channel < D)[None, None, :]
    bytes_there = (token < UNIT)[:, None, None] & (byte < BYTES)[None, None, :]
    group = (slab * UNITS + unit) * D + channel[None, :]
    code = ((slab * UNITS + unit) * UNIT + token)[:, None, None] * BYTES + byte[None, None, :]
    return token, channel, there, code, bytes_there, group, (channel < D)[None, :]


@triton.jit(do_not_specialize=["UNITS"])
def _quantise(VECTORS, CODES, SCALES, MINIMA, SLAB_STRIDE, ROW_STRIDE, UNITS, UNIT: tl.constexpr, D: tl.constexpr,
              BYTES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, STORED: tl.constexpr,
              UPCAST: tl.constexpr):  # fmt: skip
    """One unit of tokens, BLOCK channels."""
    slab, unit = tl.program_id(0).to(tl.int64) // UNITS, tl.program_id(0) % UNITS
    token, channel, there, code, bytes_there, group, groups_there = _channels_at(
        unit, slab, UNITS, UNIT, BYTES, D, ROWS, BLOCK, BITS
    )
    place = slab * SLAB_STRIDE + (unit.to(tl.int64) * UNIT + token)[:, None, None] * ROW_STRIDE + channel[None, None, :]
    x = tl.load(VECTORS + place, mask=there, other=0.0).to(tl.float32)  # [ROWS, 1, BLOCK]
    step, minimum = grid_of(x, there, 0, BITS, STORED, UPCAST)
    codes = codes_on(x, there, step, minimum, 0, BITS)
    tl.store(CODES + code, packed(codes, BITS), mask=bytes_there)
    tl.store(SCALES + group, step.to(STORED), mask=groups_there)
    tl.store(MINIMA + group, minimum.to(STORED), mask=groups_there)


@triton.jit(do_not_specialize=["UNITS"])
def _dequantise(CODES, SCALES, MINIMA, OUT, UNITS, UNIT: tl.constexpr, D: tl.constexpr, BYTES: tl.constexpr,
                ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
                UPCAST: tl.constexpr):  # fmt: skip
    """One unit of tokens, BLOCK channels."""
    slab, unit = tl.program_id(0).to(tl.int64) // UNITS, tl.program_id(0) % UNITS
    token, channel, there, code, bytes_there, group, groups_there = _channels_at(
        unit, slab, UNITS, UNIT, BYTES, D, ROWS, BLOCK, BITS
    )
    codes = unpacked(tl.load(CODES + code, mask=bytes_there, other=0), BITS)
    step = tl.load(SCALES + group, mask=groups_there, other=0.0).to(tl.float32)
    minimum = tl.load(MINIMA + group, mask=groups_there, other=0.0).to(tl.float32)
    x = codes * step[None, :, :] + minimum[None, :, :]
    place = ((slab * UNITS + unit) * UNIT + token)[:, None, None] * D + channel[None, None, :]
    tl.store(OUT + place, rounded(x, DTYPE, UPCAST).to(DTYPE), mask=there)


def quantise_channels(
    vectors: Tensor, unit: int, bits: int, stored: torch.dtype, *, out: Packed | None = None
) -> Packed:
    """Codes, scales and minima; a group is one channel of `unit` consecutive tokens.

    Args:
        vectors: [S, n, D] float32, bfloat16 or float16, n divisible by `unit`; only numbers of a token need be
            contiguous.
        unit: at most 256.
        bits: 2, 4 or 8.
        stored: of scales and minima.
        out: what is returned, contiguous.

    Returns:
        Codes, uint8 [S, n / unit, unit, ceil(D · bits / 8)], lowest bits first; scales and minima [S, n / unit, D].
        A group with a NaN has NaN for both.

    Raises:
        UnsupportedInputError: nothing was written.
    """
    slabs, units = vectors.shape[0], vectors.shape[1] // max(unit, 1)
    check_vectors(vectors, bits, stored)
    require(1 <= unit <= _LONGEST and vectors.shape[1] % unit == 0, f"units of {unit} of {vectors.shape[1]} tokens")
    width, shape = -(-vectors.shape[2] * bits // 8), (slabs, units, vectors.shape[2])
    out = room_for((slabs, units, unit, width), shape, stored, vectors.device) if out is None else out
    check_packed(out, (slabs, units, unit, width), shape, stored, vectors.device)
    if vectors.numel():
        options = _options(unit, vectors.shape[2], bits)
        _quantise[slabs * units, cdiv(vectors.shape[2], options["BLOCK"])](
            *(vectors, *out, vectors.stride(0), vectors.stride(1), units),
            **options,
            STORED=TYPES[stored],
            UPCAST=interpreting(),
        )
    return out


def dequantise_channels(
    codes: Tensor, scales: Tensor, minima: Tensor, bits: int, dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """Code · scale + minimum, rounded to `dtype`; what float16 cannot hold becomes the largest that it can.

    Args:
        codes: as `quantise_channels` returns them, contiguous, like scales and minima.
        scales: [S, n / unit, D].
        minima: likewise.
        bits: 2, 4 or 8.
        dtype: float32, bfloat16 or float16.
        out: what is returned, contiguous.

    Returns:
        [S, n, D].

    Raises:
        UnsupportedInputError: nothing was written.
    """
    check_device(codes.device)
    require(codes.ndim == 4 and scales.ndim == 3, f"codes of {codes.ndim} and scales of {scales.ndim} dimensions")
    slabs, units, unit, _ = codes.shape
    dim = scales.shape[2]
    check_kinds(dim, bits, scales.dtype, dtype)
    require(1 <= unit <= _LONGEST, f"units of {unit} tokens")
    shape = (slabs, units, unit, -(-dim * bits // 8))
    check_packed((codes, scales, minima), shape, (slabs, units, dim), scales.dtype, codes.device)
    out = torch.empty((slabs, units * unit, dim), dtype=dtype, device=codes.device) if out is None else out
    check_tensor("out", out, dtype, (slabs, units * unit, dim), codes.device)
    if out.numel():
        options = _options(unit, dim, bits)
        _dequantise[slabs * units, cdiv(dim, options["BLOCK"])](
            *(codes, scales, minima, out, units), **options, DTYPE=TYPES[dtype], UPCAST=interpreting()
        )
    return out


def _options(unit: int, dim: int, bits: int) -> dict[str, int]:
    rows = next_power_of_2(unit)
    block = min(max(16, next_power_of_2(dim)), max(16, _NUMBERS // rows))
    return {"UNIT": unit, "D": dim, "BYTES": -(-dim * bits // 8), "ROWS": rows, "BLOCK": block, "BITS": bits}


def traffic(slabs: int, tokens: int, dim: int, unit: int, bits: int, itemsize: int, stored: int) -> Traffic:
    """Bytes of `quantise_channels`; those of `dequantise_channels` are the same, read and written changed over.

    `itemsize` and `stored` are the bytes of a number, and of a scale or minimum.
    """
    groups = slabs * (tokens // unit) * dim * stored
    written = {"codes": slabs * tokens * -(-dim * bits // 8), "scales": groups, "minima": groups}
    return Traffic({"vectors": slabs * tokens * dim * itemsize}, written)


def builds() -> Iterator[Build]:
    """The launches for bfloat16 vectors of the usual head dims and groups of 32 tokens."""
    for dim, bits in ((128, 4), (128, 2), (64, 4)):
        options, name = _options(32, dim, bits), f"bfloat16 D={dim} bits={bits}"
        packed_types = {"CODES": "*u8", "SCALES": "*fp16", "MINIMA": "*fp16"}
        types = {"VECTORS": "*bf16", **packed_types, "SLAB_STRIDE": "i64", "ROW_STRIDE": "i32", "UNITS": "i32"}
        aligned = ("VECTORS", *packed_types, "SLAB_STRIDE", "ROW_STRIDE")
        constants = {**options, "STORED": tl.float16, "UPCAST": False}
        yield Build(f"quantise_channels {name}", _quantise, types, constants, aligned)
        types = {**packed_types, "OUT": "*bf16", "UNITS": "i32"}
        constants = {**options, "DTYPE": tl.bfloat16, "UPCAST": False}
        aligned = (*packed_types, "OUT")
        yield Build(f"dequantise_channels {name}", _dequantise, types, constants, aligned, wide_loads=False)
