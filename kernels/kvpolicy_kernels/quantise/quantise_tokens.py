"""Per-token quantisation of groups of consecutive channels (values of KIVI, arXiv:2402.02750), packed.

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

_NUMBERS = 2048  # per program


@triton.jit
def _offsets(N, GROUP: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr,
             GROUPS_P: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """Slab, token and channel of this program's numbers, offsets of code bytes and scales, and the masks of all three.

    A group starts at a byte of its own: it is the only one of the token, or fills whole bytes.
    """
    blocks = tl.cdiv(N, ROWS)
    slab, first = tl.program_id(0).to(tl.int64) // blocks, (tl.program_id(0) % blocks) * ROWS
    token, group = first + tl.arange(0, ROWS), tl.arange(0, GROUPS_P)
    number, byte = tl.arange(0, BLOCK), tl.arange(0, BLOCK * BITS // 8)
    row = slab * N + token
    group_mask = (token < N)[:, None] & (group < GROUPS)[None, :]
    mask = group_mask[:, :, None] & (number < GROUP)[None, None, :]
    byte_mask = group_mask[:, :, None] & (byte < (GROUP * BITS + 7) // 8)[None, None, :]
    channel = (group * GROUP)[:, None] + number[None, :]
    code_offsets = row[:, None, None] * BYTES + (group * (GROUP * BITS // 8))[None, :, None] + byte[None, None, :]
    return slab, token, channel, mask, code_offsets, byte_mask, row[:, None] * GROUPS + group[None, :], group_mask


@triton.jit(do_not_specialize=["N"])
def _quantise(VECTORS, CODES, SCALES, MINIMA, SLAB_STRIDE, ROW_STRIDE, N, GROUP: tl.constexpr, GROUPS: tl.constexpr,
              BYTES: tl.constexpr, ROWS: tl.constexpr, GROUPS_P: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
              STORED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """ROWS tokens of a slab. Grid (S · blocks of tokens,)."""
    slab, token, channel, mask, code_offsets, byte_mask, scale_offsets, group_mask = _offsets(
        N, GROUP, GROUPS, BYTES, ROWS, GROUPS_P, BLOCK, BITS
    )
    row = VECTORS + slab * SLAB_STRIDE + token.to(tl.int64)[:, None, None] * ROW_STRIDE
    x = tl.load(row + channel[None, :, :], mask=mask, other=0.0).to(tl.float32)  # [ROWS, GROUPS_P, BLOCK]
    step, minimum = scale_and_minimum(x, mask, 2, BITS, STORED, UPCAST)
    tl.store(CODES + code_offsets, pack_codes(quantise_codes(x, mask, step, minimum, 2, BITS), BITS), mask=byte_mask)
    tl.store(SCALES + scale_offsets, step.to(STORED), mask=group_mask)
    tl.store(MINIMA + scale_offsets, minimum.to(STORED), mask=group_mask)


@triton.jit(do_not_specialize=["N"])
def _dequantise(CODES, SCALES, MINIMA, OUT, N, GROUP: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr,
                ROWS: tl.constexpr, GROUPS_P: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
                DTYPE: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """ROWS tokens of a slab. Grid (S · blocks of tokens,)."""
    slab, token, channel, mask, code_offsets, byte_mask, scale_offsets, group_mask = _offsets(
        N, GROUP, GROUPS, BYTES, ROWS, GROUPS_P, BLOCK, BITS
    )
    codes = unpack_codes(tl.load(CODES + code_offsets, mask=byte_mask, other=0), BITS)
    step = tl.load(SCALES + scale_offsets, mask=group_mask, other=0.0).to(tl.float32)
    minimum = tl.load(MINIMA + scale_offsets, mask=group_mask, other=0.0).to(tl.float32)
    x = round_to(codes * step[:, :, None] + minimum[:, :, None], DTYPE, UPCAST).to(DTYPE)
    tl.store(OUT + (slab * N + token)[:, None, None] * (GROUP * GROUPS) + channel[None, :, :], x, mask=mask)


def quantise_tokens(
    vectors: Tensor, group: int, bits: int, stored: torch.dtype, *, out: Packed | None = None
) -> Packed:
    """Quantise every `group` consecutive channels of each token.

    Args:
        vectors: [S, n, D] float32, bfloat16 or float16; contiguous along D.
        group: channels per group; D itself, or a divisor of D whose codes fill whole bytes.
        bits: 2, 4 or 8.
        stored: dtype of scales and minima.
        out: the results, contiguous, written in place.

    Returns:
        Codes, uint8 [S, n, ceil(D · bits / 8)], lowest bits first; scales and minima [S, n, D / group]. A group with a
        NaN has NaN for both.

    Raises:
        UnsupportedInputError: the kernel does not support these inputs; nothing was written.
    """
    check_vectors(vectors, bits, stored)
    slabs, tokens, dim = vectors.shape
    _check_group(group, dim, bits)
    shapes = (slabs, tokens, -(-dim * bits // 8)), (slabs, tokens, dim // group)
    out = empty_packed(*shapes, stored, vectors.device) if out is None else out
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
    """Code · scale + minimum, rounded to `dtype`; values beyond the range of float16 are clamped to it.

    Args:
        codes: as `quantise_tokens` returns them, contiguous, like scales and minima.
        scales: [S, n, groups].
        minima: likewise.
        dim: D.
        bits: 2, 4 or 8.
        dtype: float32, bfloat16 or float16.
        out: the result, contiguous, written in place.

    Returns:
        [S, n, D].

    Raises:
        UnsupportedInputError: the kernel does not support these inputs; nothing was written.
    """
    check_device(codes.device)
    require(codes.ndim == 3 and scales.ndim == 3, f"codes of {codes.ndim} and scales of {scales.ndim} dimensions")
    check_dtypes(dim, bits, scales.dtype, dtype)
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
    sizes = {"ROWS": max(1, _NUMBERS // (sets * block)), "GROUPS_P": sets, "BLOCK": block}
    return {"GROUP": group, "GROUPS": dim // group, "BYTES": -(-dim * bits // 8), "BITS": bits, **sizes}


def traffic(slabs: int, tokens: int, dim: int, group: int, bits: int, itemsize: int, stored: int) -> Traffic:
    """Bytes that `quantise_tokens` moves; `dequantise_tokens` moves the same, with read and written swapped.

    `itemsize` is the bytes per vector element, `stored` per scale or minimum.
    """
    groups = slabs * tokens * (dim // group) * stored
    written = {"codes": slabs * tokens * -(-dim * bits // 8), "scales": groups, "minima": groups}
    return Traffic({"vectors": slabs * tokens * dim * itemsize}, written)


def compile_specs() -> Iterator[CompileSpec]:
    """The launches for bfloat16 vectors of usual head dims, in groups of 32 channels and of all channels."""
    for dim, group, bits in ((128, 32, 4), (128, 32, 2), (128, 128, 4), (64, 32, 4)):
        options, name = _options(group, dim, bits), f"bfloat16 D={dim} group={group} bits={bits}"
        packed_types = {"CODES": "*u8", "SCALES": "*fp16", "MINIMA": "*fp16"}
        types = {"VECTORS": "*bf16", **packed_types, "SLAB_STRIDE": "i64", "ROW_STRIDE": "i32", "N": "i32"}
        aligned = ("VECTORS", *packed_types, "SLAB_STRIDE", "ROW_STRIDE")
        constants = {**options, "STORED": tl.float16, "UPCAST": False}
        yield CompileSpec(f"quantise_tokens {name}", _quantise, types, constants, aligned)
        types = {**packed_types, "OUT": "*bf16", "N": "i32"}
        constants = {**options, "DTYPE": tl.bfloat16, "UPCAST": False}
        aligned = (*packed_types, "OUT")
        yield CompileSpec(f"dequantise_tokens {name}", _dequantise, types, constants, aligned, wide_loads=False)
