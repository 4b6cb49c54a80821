"""Quantisation of neighbouring channels of one token (values of KIVI, arXiv:2402.02750), packed.

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

_NUMBERS = 2048  # of one program


@triton.jit
def _tokens_at(N, GROUP: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr,
               SETS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """Slab, token and channel of the numbers of this program, and places of codes and groups; each with what is there.

    A group begins with a byte of its own: it is the only one, or fills whole bytes.
    """
    blocks = tl.cdiv(N, ROWS)
    slab, first = tl.program_id(0).to(tl.int64) // blocks, (tl.program_id(0) % blocks) * ROWS
    token, group = first + tl.arange(0, ROWS), tl.arange(0, SETS)
    number, byte = tl.arange(0, BLOCK), tl.arange(0, BLOCK * BITS // 8)
    row = slab * N + token
    groups_there = (token < N)[:, None] & (group < GROUPS)[None, :]
    there = groups_there[:, :, None] & (number < GROUP)[None, None, :]
    bytes_there = groups_there[:, :, None] & (byte < (GROUP * BITS + 7) // 8)[None, None, :]
    channel = (group * GROUP)[:, None] + number[None, :]
    code = row[:, None, None] * BYTES + (group * (GROUP * BITS // 8))[None, :, None] + byte[None, None, :]
    return slab, token, channel, there, code, bytes_there, row[:, None] * GROUPS + group[None, :], groups_there


@triton.jit(do_not_specialize=["N"])
def _quantise(VECTORS, CODES, SCALES, MINIMA, SLAB_STRIDE, ROW_STRIDE, N, GROUP: tl.constexpr, GROUPS: tl.constexpr,
              BYTES: tl.constexpr, ROWS: tl.constexpr, SETS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
              STORED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """ROWS tokens."""
    slab, token, channel, there, code, bytes_there, place, groups_there = _tokens_at(
        N, GROUP, GROUPS, BYTES, ROWS, SETS, BLOCK, BITS
    )
    row = VECTORS + slab * SLAB_STRIDE + token.to(tl.int64)[:, None, None] * ROW_STRIDE
    x = tl.load(row + channel[None, :, :], mask=there, other=0.0).to(tl.float32)  # [ROWS, SETS, BLOCK]
    step, minimum = grid_of(x, there, 2, BITS, STORED, UPCAST)
    tl.store(CODES + code, packed(codes_on(x, there, step, minimum, 2, BITS), BITS), mask=bytes_there)
    tl.store(SCALES + place, step.to(STORED), mask=groups_there)
    tl.store(MINIMA + place, minimum.to(STORED), mask=groups_there)


@triton.jit(do_not_specialize=["N"])
def _dequantise(CODES, SCALES, MINIMA, OUT, N, GROUP: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr,
                ROWS: tl.constexpr, SETS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
                DTYPE: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """ROWS tokens."""
    slab, token, channel, there, code, bytes_there, place, groups_there = _tokens_at(
        N, GROUP, GROUPS, BYTES, ROWS, SETS, BLOCK, BITS
    )
    codes = unpacked(tl.load(CODES + code, mask=bytes_there, other=0), BITS)
    step = tl.load(SCALES + place, mask=groups_there, other=0.0).to(tl.float32)
    minimum = tl.load(MINIMA + place, mask=groups_there, other=0.0).to(tl.float32)
    x = rounded(codes * step[:, :, None] + minimum[:, :, None], DTYPE, UPCAST).to(DTYPE)
    tl.store(OUT + (slab * N + token)[:, None, None] * (GROUP * GROUPS) + channel[None, :, :], x, mask=there)


def quantise_tokens(
    vectors: Tensor, group: int, bits: int, stored: torch.dtype, *, out: Packed | None = None
) -> Packed:
    """Codes, scales and minima; a group is `group` neighbouring channels of one token.

    Args:
        vectors: [S, n, D] float32, bfloat16 or float16; only numbers of a token need be contiguous.
        group: divides D; D itself, or a number whose codes fill whole bytes.
        bits: 2, 4 or 8.
        stored: of scales and minima.
        out: what is returned, contiguous.

    Returns:
        Codes, uint8 [S, n, ceil(D · bits / 8)], lowest bits first; scales and minima [S, n, D / group]. A group with a
        NaN has NaN for both.

    Raises:
        UnsupportedInputError: nothing was written.
    """
    check_vectors(vectors, bits, stored)
    slabs, tokens, dim = vectors.shape
    _check_group(group, dim, bits)
    shapes = (slabs, tokens, -(-dim * bits // 8)), (slabs, tokens, dim // group)
    out = room_for(*shapes, stored, vectors.device) if out is None else out
    check_packed(out, *shapes, stored, vectors.device)
    if vectors.numel():
        options = _options(group, dim, bits)
        _quantise[(slabs * cdiv(tokens, options["ROWS"]),)](
            *(vectors, *out, vectors.stride(0), vectors.stride(1), tokens),
            **options,
            STORED=TYPES[stored],
            UPCAST=interpreting(),
        )
    return out


def dequantise_tokens(
    codes: Tensor, scales: Tensor, minima: Tensor, dim: int, bits: int, dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """Code · scale + minimum, rounded to `dtype`; what float16 cannot hold becomes the largest that it can.

    Args:
        codes: as `quantise_tokens` returns them, contiguous, like scales and minima.
        scales: [S, n, groups].
        minima: likewise.
        dim: D.
        bits: 2, 4 or 8.
        dtype: float32, bfloat16 or float16.
        out: what is returned, contiguous.

    Returns:
        [S, n, D].

    Raises:
        UnsupportedInputError: nothing was written.
    """
    check_device(codes.device)
    require(codes.ndim == 3 and scales.ndim == 3, f"codes of {codes.ndim} and scales of {scales.ndim} dimensions")
    check_kinds(dim, bits, scales.dtype, dtype)
    slabs, tokens, groups = scales.shape
    require(groups > 0 and dim % groups == 0, f"{groups} groups of {dim} channels")
    _check_group(dim // groups, dim, bits)
    check_packed(
        (codes, scales, minima), (slabs, tokens, -(-dim * bits // 8)), tuple(scales.shape), scales.dtype, codes.device
    )
    out = torch.empty((slabs, tokens, dim), dtype=dtype, device=codes.device) if out is None else out
    check_tensor("out", out, dtype, (slabs, tokens, dim), codes.device)
    if out.numel():
        options = _options(dim // groups, dim, bits)
        _dequantise[(slabs * cdiv(tokens, options["ROWS"]),)](
            *(codes, scales, minima, out, tokens), **options, DTYPE=TYPES[dtype], UPCAST=interpreting()
        )
    return out


def _check_group(group: int, dim: int, bits: int) -> None:
    require(1 <= group <= dim and dim % group == 0, f"groups of {group} of {dim} channels")
    require(group == dim or group * bits % 8 == 0, f"groups of {group} channels of {bits} bits share a byte")


def _options(group: int, dim: int, bits: int) -> dict[str, int]:
    sets, block = next_power_of_2(dim // group), max(8 // bits, next_power_of_2(group))
    sizes = {"ROWS": max(1, _NUMBERS // (sets * block)), "SETS": sets, "BLOCK": block}
    return {"GROUP": group, "GROUPS": dim // group, "BYTES": -(-dim * bits // 8), "BITS": bits, **sizes}


def traffic(slabs: int, tokens: int, dim: int, group: int, bits: int, itemsize: int, stored: int) -> Traffic:
    """Bytes of `quantise_tokens`; those of `dequantise_tokens` are the same, read and written changed over.

    `itemsize` and `stored` are the bytes of a number, and of a scale or minimum.
    """
    groups = slabs * tokens * (dim // group) * stored
    written = {"codes": slabs * tokens * -(-dim * bits // 8), "scales": groups, "minima": groups}
    return Traffic({"vectors": slabs * tokens * dim * itemsize}, written)


def builds() -> Iterator[Build]:
    """The launches for bfloat16 vectors of the usual head dims, in groups of 32 channels or all of them."""
    for dim, group, bits in ((128, 32, 4), (128, 32, 2), (128, 128, 4), (64, 32, 4)):
        options, name = _options(group, dim, bits), f"bfloat16 D={dim} group={group} bits={bits}"
        packed_types = {"CODES": "*u8", "SCALES": "*fp16", "MINIMA": "*fp16"}
        types = {"VECTORS": "*bf16", **packed_types, "SLAB_STRIDE": "i64", "ROW_STRIDE": "i32", "N": "i32"}
        aligned = ("VECTORS", *packed_types, "SLAB_STRIDE", "ROW_STRIDE")
        constants = {**options, "STORED": tl.float16, "UPCAST": False}
        yield Build(f"quantise_tokens {name}", _quantise, types, constants, aligned)
        types = {**packed_types, "OUT": "*bf16", "N": "i32"}
        constants = {**options, "DTYPE": tl.bfloat16, "UPCAST": False}
        aligned = (*packed_types, "OUT")
        yield Build(f"dequantise_tokens {name}", _dequantise, types, constants, aligned, wide_loads=False)
