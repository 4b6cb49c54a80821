"""Launches of decode attention to compile without a GPU: bfloat16, 4 query heads per KV head."""

from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl

from kvpolicy_kernels.attention.combine_splits import combine_splits
from kvpolicy_kernels.attention.decode import format_constants
from kvpolicy_kernels.attention.decode_split import decode_split
from kvpolicy_kernels.attention.kv_input import PackedColumn, Unpacking
from kvpolicy_kernels.common.compile_spec import CompileSpec
from kvpolicy_kernels.quantise.unpack import centred, codebook, fp8, per_channel, per_token, per_vector, scaled_fp8

_HEADS = 8
_GROUP = 32  # of tokens or channels that are quantised together
_SPLIT = ("PARTIAL", "MAXIMA", "SUMS")
_TYPES = {
    "QUERIES": "*bf16",
    "STARTS": "*i64",
    "LENGTHS": "*i32",
    "KEYS": "*i64",
    "KEY_STARTS": "*i64",
    "VALUES": "*i64",
    "VALUE_STARTS": "*i64",
    "OUT": "*bf16",
    "scaling": "fp32",
    "listed": "i32",
    "pitch": "i32",
    "split_size": "i32",
    "splits": "i32",
}
_OPTIONAL = {
    "POSITIONS": "*i64",
    "QUERY_POSITIONS": "*i32",
    "VOTES": "*i64",
    "SLOTS": "*i64",
    "LOGITS": "*fp32",
    "MASS": "*i64",
    **dict.fromkeys(_SPLIT, "*fp32"),
}


def compile_specs() -> Iterator[CompileSpec]:
    """Unpacked entries with one split and several, each optional input and output, and packed formats."""
    for dim in (64, 128):
        yield _split_spec(f"decode D={dim}", dim)
        yield _split_spec(f"decode D={dim} split", dim, *_SPLIT)
        yield _combine_spec(f"combine D={dim}", dim, "PARTIAL")
    yield _split_spec("decode D=128 votes", 128, *_SPLIT, "VOTES")
    yield _split_spec("decode D=128 positions", 128, *_SPLIT, "POSITIONS", "QUERY_POSITIONS")
    yield _split_spec("decode D=128 list", 128, *_SPLIT, "SLOTS")
    yield _split_spec("decode D=128 logits", 128, *_SPLIT, "LOGITS")
    yield _combine_spec("combine D=128 mass", 128, "PARTIAL", "LOGITS", "VOTES", "MASS")
    for bits in (2, 4):
        yield _split_spec(
            f"decode D=128 kivi{bits}", 128, *_SPLIT, keys=_channels(bits, 128), values=_tokens(bits, 128)
        )
    yield _split_spec("decode D=128 fp8", 128, *_SPLIT, keys=_fp8(128), values=_fp8(128))
    yield _split_spec("decode D=128 tada4", 128, *_SPLIT, keys=_centred(4, 128), values=_centred(4, 128))
    for bits in (1, 2, 3, 4):
        rotated = _codebook(bits, 128)
        yield _split_spec(f"decode D=128 rotation{bits}", 128, *_SPLIT, keys=rotated, values=rotated)
    for bits in (3, 4):
        rotated = _codebook(bits, 128)
        yield _split_spec(f"decode D=128 turboquant{bits}", 128, *_SPLIT, keys=rotated, values=_vectors(bits, 128))
    float8 = Unpacking(fp8, (PackedColumn(128, torch.uint8),))
    yield _split_spec("decode D=128 turboquant8", 128, *_SPLIT, keys=float8, values=_vectors(4, 128))


def _split_spec(
    name: str, dim: int, *given: str, keys: Unpacking | None = None, values: Unpacking | None = None
) -> CompileSpec:
    shape = {"HEADS": _HEADS, "D": dim, "DP": dim, "BLOCK": 64 if keys is None else 32, "TRIPS": None}
    types: dict[str, Any] = dict(_TYPES)
    for prefix, unpacking in (("KEY", keys), ("VALUE", values)):
        if unpacking is not None:
            types |= {f"{prefix}_COLUMNS": ("*i64",) * len(unpacking.columns), f"{prefix}_GROUPS": ("*i64", "*i32")}
    formats = {**format_constants("KEY", keys, _HEADS), **format_constants("VALUE", values, _HEADS)}
    warps = 2 if dim == 64 and keys is None else 4
    return _spec(
        name, decode_split, types, given, {**_common_constants(dim), **shape, **formats}, tensor_cores=True, warps=warps
    )


def _combine_spec(name: str, dim: int, *given: str) -> CompileSpec:
    constants = {**_common_constants(dim), "SPLITS": 32, "BLOCK": 128}
    return _spec(name, combine_splits, _TYPES, ("MAXIMA", "SUMS", *given), constants, tensor_cores=False)


def _spec(
    name: str,
    kernel: Any,
    types: dict[str, Any],
    given: tuple[str, ...],
    constants: dict[str, Any],
    *,
    tensor_cores: bool,
    warps: int = 4,
) -> CompileSpec:
    """Parameters that are neither `given`, nor required, nor constants are None."""
    types = {**types, **{argument: _OPTIONAL[argument] for argument in given}}
    types = {argument: types[argument] for argument in kernel.arg_names if argument in types}
    absent = dict.fromkeys(argument for argument in kernel.arg_names if argument not in types)
    aligned = tuple(argument for argument, kind in types.items() if kind[0] == "*")
    return CompileSpec(name, kernel, types, {**absent, **constants}, aligned, warps, tensor_cores=tensor_cores)


def _common_constants(dim: int) -> dict[str, Any]:
    return {
        "DTYPE": tl.bfloat16,
        "PER_LAYER": _HEADS,
        "G": 4,
        "GP": 16,
        "DV": dim,
        "DVP": dim,
        "UPCAST": False,
    }


def _channels(bits: int, dim: int) -> Unpacking:
    per_group = PackedColumn(dim, torch.float16, shared=True)
    codes = PackedColumn(_GROUP * dim * bits // 8, torch.uint8)
    return Unpacking(per_channel, (codes, per_group, per_group), _GROUP, (bits, _GROUP))


def _tokens(bits: int, dim: int) -> Unpacking:
    per_group = PackedColumn(dim // _GROUP, torch.float16)
    return Unpacking(per_token, (PackedColumn(dim * bits // 8, torch.uint8), per_group, per_group), 1, (bits, _GROUP))


def _fp8(dim: int) -> Unpacking:
    return Unpacking(scaled_fp8, (PackedColumn(dim, torch.uint8), PackedColumn(1, torch.float16)))


def _centred(bits: int, dim: int) -> Unpacking:
    per_group = PackedColumn(_HEADS, torch.float16)
    codes = PackedColumn(_HEADS * dim * bits // 8, torch.uint8)
    columns = PackedColumn(dim, torch.float16), codes, per_group, per_group
    return Unpacking(centred, columns, options=(bits, dim, _HEADS), joint=True)


def _codebook(bits: int, dim: int) -> Unpacking:
    levels = [index + 0.5 - 2 ** (bits - 1) for index in range(2**bits)]
    columns = PackedColumn(dim * bits // 8, torch.uint8), PackedColumn(1, torch.float16)
    return Unpacking(codebook, columns, options=(bits, *levels), in_basis=True)


def _vectors(bits: int, dim: int) -> Unpacking:
    each = PackedColumn(1, torch.float16)
    return Unpacking(per_vector, (PackedColumn(dim * bits // 8, torch.uint8), each, each), options=(bits,))
