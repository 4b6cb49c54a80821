"""Per-channel quantisation of groups of consecutive tokens (keys of KIVI, arXiv:2402.02750), packed.

References in `kvpolicy_plugins.codecs.shared`: `affine.quantise` and `dequantise`, `packing.pack` and `unpack`.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from kvpolicy_kernels.common.addressing import TYPES, check_device, check_tensor
from kvpolicy_kernels.common.compile_spec import CompileSpec
from kvpolicy_kernels.common.support import interpreting, require
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.quantise.affine import (
    Packed,
    check_dtypes,
    check_packed,
    check_vectors,
    empty_packed,
    pack_codes,
    quantise_codes,
    scale_and_minimum,
    unpack_codes,
)
from kvpolicy_kernels.quantise.unpack import round_to

_MAX_GROUP = 256  # tokens per group
_NUMBERS = 4096  # per program


@triton.jit
def _offsets(token_group, slab, NUM_GROUPS, GROUP_SIZE: tl.constexpr, BYTES: tl.constexpr, D: tl.constexpr,
             ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """Offsets of this program's numbers (token, channel), code bytes and scales, each with its mask."""
    first = tl.program_id(1) * BLOCK
    token, channel = tl.arange(0, ROWS), first + tl.arange(0, BLOCK)
    byte = first * BITS // 8 + tl.arange(0, BLOCK * BITS // 8)
    mask = (token < GROUP_SIZE)[:, None, None] & (channel < D)[None, None, :]
    byte_mask = (token < GROUP_SIZE)[:, None, None] & (byte < BYTES)[None, None, :]
    scale_offsets = (slab * NUM_GROUPS + token_group) * D + channel[None, :]
    code_offsets = ((slab * NUM_GROUPS + token_group) * GROUP_SIZE + token)[:, None, None] * BYTES + byte[None, None, :]
    return token, channel, mask, code_offsets, byte_mask, scale_offsets, (channel < D)[None, :]


@triton.jit(do_not_specialize=["NUM_GROUPS"])
def _quantise(VECTORS, CODES, SCALES, MINIMA, SLAB_STRIDE, ROW_STRIDE, NUM_GROUPS, GROUP_SIZE: tl.constexpr,
              D: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
              STORED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """One group of tokens, BLOCK channels. Grid (S · groups, blocks of channels)."""
    slab, token_group = tl.program_id(0).to(tl.int64) // NUM_GROUPS, tl.program_id(0) % NUM_GROUPS
    token, channel, mask, code_offsets, byte_mask, scale_offsets, group_mask = _offsets(
        token_group, slab, NUM_GROUPS, GROUP_SIZE, BYTES, D, ROWS, BLOCK, BITS
    )
    row = token_group.to(tl.int64) * GROUP_SIZE + token
    offsets = slab * SLAB_STRIDE + row[:, None, None] * ROW_STRIDE + channel[None, None, :]
    x = tl.load(VECTORS + offsets, mask=mask, other=0.0).to(tl.float32)  # [ROWS, 1, BLOCK]
    step, minimum = scale_and_minimum(x, mask, 0, BITS, STORED, UPCAST)
    codes = quantise_codes(x, mask, step, minimum, 0, BITS)
    tl.store(CODES + code_offsets, pack_codes(codes, BITS), mask=byte_mask)
    tl.store(SCALES + scale_offsets, step.to(STORED), mask=group_mask)
    tl.store(MINIMA + scale_offsets, minimum.to(STORED), mask=group_mask)


@triton.jit(do_not_specialize=["NUM_GROUPS"])
def _dequantise(CODES, SCALES, MINIMA, OUT, NUM_GROUPS, GROUP_SIZE: tl.constexpr, D: tl.constexpr, BYTES: tl.constexpr,
                ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
                UPCAST: tl.constexpr):  # fmt: skip
    """One group of tokens, BLOCK channels. Grid (S · groups, blocks of channels)."""
    slab, token_group = tl.program_id(0).to(tl.int64) // NUM_GROUPS, tl.program_id(0) % NUM_GROUPS
    token, channel, mask, code_offsets, byte_mask, scale_offsets, group_mask = _offsets(
        token_group, slab, NUM_GROUPS, GROUP_SIZE, BYTES, D, ROWS, BLOCK, BITS
    )
    codes = unpack_codes(tl.load(CODES + code_offsets, mask=byte_mask, other=0), BITS)
    step = tl.load(SCALES + scale_offsets, mask=group_mask, other=0.0).to(tl.float32)
    minimum = tl.load(MINIMA + scale_offsets, mask=group_mask, other=0.0).to(tl.float32)
    x = codes * step[None, :, :] + minimum[None, :, :]
    offsets = ((slab * NUM_GROUPS + token_group) * GROUP_SIZE + token)[:, None, None] * D + channel[None, None, :]
    tl.store(OUT + offsets, round_to(x, DTYPE, UPCAST).to(DTYPE), mask=mask)


def quantise_channels(
    vectors: Tensor, group_size: int, bits: int, stored: torch.dtype, *, out: Packed | None = None
) -> Packed:
    """Quantise each channel of every `group_size` consecutive tokens.

    Args:
        vectors: [S, n, D] float32, bfloat16 or float16, n divisible by `group_size`; contiguous along D.
        group_size: tokens per group, at most 256.
        bits: 2, 4 or 8.
        stored: dtype of scales and minima.
        out: the results, contiguous, written in place.

    Returns:
        Codes, uint8 [S, n / group_size, group_size, ceil(D · bits / 8)], lowest bits first; scales and minima,
        [S, n / group_size, D]. A group with a NaN has NaN for both.

    Raises:
        UnsupportedInputError: the kernel does not support these inputs; nothing was written.
    """
    slabs, groups = vectors.shape[0], vectors.shape[1] // max(group_size, 1)
    check_vectors(vectors, bits, stored)
    divides = 1 <= group_size <= _MAX_GROUP and vectors.shape[1] % group_size == 0
    require(divides, f"groups of {group_size} of {vectors.shape[1]} tokens")
    width, shape = -(-vectors.shape[2] * bits // 8), (slabs, groups, vectors.shape[2])
    out = empty_packed((slabs, groups, group_size, width), shape, stored, vectors.device) if out is None else out
    check_packed(out, (slabs, groups, group_size, width), shape, stored, vectors.device)
    if vectors.numel():
        options = _options(group_size, vectors.shape[2], bits)
        _quantise[slabs * groups, cdiv(vectors.shape[2], options["BLOCK"])](
            *(vectors, *out, vectors.stride(0), vectors.stride(1), groups),
            **options,
            STORED=TYPES[stored],
            UPCAST=interpreting(),
        )
    return out


def dequantise_channels(
    codes: Tensor, scales: Tensor, minima: Tensor, bits: int, dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """Code · scale + minimum, rounded to `dtype`; values beyond the range of float16 are clamped to it.

    Args:
        codes: as `quantise_channels` returns them, contiguous, like scales and minima.
        scales: [S, n / group_size, D].
        minima: likewise.
        bits: 2, 4 or 8.
        dtype: float32, bfloat16 or float16.
        out: the result, contiguous, written in place.

    Returns:
        [S, n, D].

    Raises:
        UnsupportedInputError: the kernel does not support these inputs; nothing was written.
    """
    check_device(codes.device)
    require(codes.ndim == 4 and scales.ndim == 3, f"codes of {codes.ndim} and scales of {scales.ndim} dimensions")
    slabs, groups, group_size, _ = codes.shape
    dim = scales.shape[2]
    check_dtypes(dim, bits, scales.dtype, dtype)
    require(1 <= group_size <= _MAX_GROUP, f"groups of {group_size} tokens")
    shape = (slabs, groups, group_size, -(-dim * bits // 8))
    check_packed((codes, scales, minima), shape, (slabs, groups, dim), scales.dtype, codes.device)
    out = torch.empty((slabs, groups * group_size, dim), dtype=dtype, device=codes.device) if out is None else out
    check_tensor("out", out, dtype, (slabs, groups * group_size, dim), codes.device)
    if out.numel():
        options = _options(group_size, dim, bits)
        _dequantise[slabs * groups, cdiv(dim, options["BLOCK"])](
            *(codes, scales, minima, out, groups), **options, DTYPE=TYPES[dtype], UPCAST=interpreting()
        )
    return out


def _options(group_size: int, dim: int, bits: int) -> dict[str, int]:
    rows = next_power_of_2(group_size)
    block = min(max(16, next_power_of_2(dim)), max(16, _NUMBERS // rows))
    sizes = {"GROUP_SIZE": group_size, "D": dim, "BYTES": -(-dim * bits // 8)}
    return {**sizes, "ROWS": rows, "BLOCK": block, "BITS": bits}


def traffic(slabs: int, tokens: int, dim: int, group_size: int, bits: int, itemsize: int, stored: int) -> Traffic:
    """Bytes that `quantise_channels` moves; `dequantise_channels` moves the same, with read and written swapped.

    `itemsize` is the bytes per vector element, `stored` per scale or minimum.
    """
    groups = slabs * (tokens // group_size) * dim * stored
    written = {"codes": slabs * tokens * -(-dim * bits // 8), "scales": groups, "minima": groups}
    return Traffic({"vectors": slabs * tokens * dim * itemsize}, written)


def compile_specs() -> Iterator[CompileSpec]:
    """The launches for bfloat16 vectors of usual head dims and groups of 32 tokens."""
    for dim, bits in ((128, 4), (128, 2), (64, 4)):
        options, name = _options(32, dim, bits), f"bfloat16 D={dim} bits={bits}"
        packed_types = {"CODES": "*u8", "SCALES": "*fp16", "MINIMA": "*fp16"}
        types = {"VECTORS": "*bf16", **packed_types, "SLAB_STRIDE": "i64", "ROW_STRIDE": "i32", "NUM_GROUPS": "i32"}
        aligned = ("VECTORS", *packed_types, "SLAB_STRIDE", "ROW_STRIDE")
        constants = {**options, "STORED": tl.float16, "UPCAST": False}
        yield CompileSpec(f"quantise_channels {name}", _quantise, types, constants, aligned)
        types = {**packed_types, "OUT": "*bf16", "NUM_GROUPS": "i32"}
        constants = {**options, "DTYPE": tl.bfloat16, "UPCAST": False}
        aligned = (*packed_types, "OUT")
        yield CompileSpec(f"dequantise_channels {name}", _dequantise, types, constants, aligned, wide_loads=False)
