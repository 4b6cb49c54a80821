"""For every evicted entry, the kept entry with the most similar key, without an evicted x kept matrix.

Reference: `kvpolicy_plugins.mergers.shared.merge_groups.nearest`.
"""

from collections.abc import Iterator, Sequence

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from kvpolicy_kernels.common.addressing import (
    TYPES,
    check_device,
    check_segments,
    check_tensor,
    grid_of,
    load_rows,
    row_constants,
    segment_and_block,
    segment_pointer,
)
from kvpolicy_kernels.common.compile_spec import CompileSpec
from kvpolicy_kernels.common.launch import trips_of
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import interpreting, require
from kvpolicy_kernels.common.traffic import Traffic

_MAX_WIDTH = 256
_BLOCK_LISTED = 1024  # slots per iteration when evicted ones are listed
_ENTRIES = 32  # kept entries per program that computes norms


@triton.jit(do_not_specialize=["T", "N", "PER_LAYER"])
def _prepare(ADDRESSES, STARTS, KEPT, EVICTED, LIST, COUNTS, INVERSE_NORMS, SIMILARITY, INDEX, T, N, PER_LAYER,
             DTYPE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ENTRIES: tl.constexpr,
             LISTED: tl.constexpr):  # fmt: skip
    """Program 0 of a segment lists its evicted slots; the others compute 1 / |key| of its kept entries."""
    segment = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if part == 0:
        _list_evicted(EVICTED + segment * T, LIST + segment * T, COUNTS + segment, SIMILARITY + segment * T,
              INDEX + segment * T, T, LISTED)  # fmt: skip
    else:
        rank = (part - 1) * ENTRIES + tl.arange(0, ENTRIES)
        slots = tl.load(KEPT + segment * N + rank, mask=rank < N, other=-1)
        base = segment_pointer(ADDRESSES, STARTS, segment, PER_LAYER, DTYPE, D)
        inverse_norms = _inverse_norm(load_rows(base, slots.to(tl.int64), slots >= 0, D, BLOCK_D))
        tl.store(INVERSE_NORMS + segment * N + rank, inverse_norms, mask=rank < N)


@triton.jit
def _list_evicted(evicted, listed, count, similarity, index, T, LISTED: tl.constexpr):
    """List the evicted slots in ascending order, and fill both results with their values for other slots."""
    total = 0
    first = 0
    while first < T:
        slots = first + tl.arange(0, LISTED)
        mask = tl.load(evicted + slots, mask=slots < T, other=0).to(tl.int32)
        rank = total + tl.cumsum(mask, 0) - 1
        tl.store(listed + rank, slots, mask=mask > 0)
        tl.store(similarity + slots, tl.full((LISTED,), float("-inf"), tl.float32), mask=slots < T)
        tl.store(index + slots, tl.zeros((LISTED,), tl.int64), mask=slots < T)
        total += tl.sum(mask, 0)
        first += LISTED
    tl.store(count, total)


@triton.jit
def _inverse_norm(keys):
    """1 / max(|key|, 1e-6) of keys [BLOCK, BLOCK_D]; NaN if the squared norm is not finite."""
    keys = keys.to(tl.float32)
    square = tl.sum(keys * keys, 1)
    return tl.where(square < float("inf"), 1.0 / tl.maximum(tl.sqrt(square), 1e-6), float("nan"))


@triton.jit(do_not_specialize=["T", "N", "PER_LAYER"])
def _nearest(ADDRESSES, STARTS, KEPT, LIST, COUNTS, INVERSE_NORMS, SIMILARITY, INDEX, T, N, PER_LAYER,
             DTYPE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, EVICTED: tl.constexpr, BLOCK: tl.constexpr,
             TRIPS: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """SIMILARITY and INDEX [P, T] of a block of EVICTED entries: a running maximum over blocks of kept ones."""
    segment, block = segment_and_block(T, EVICTED)
    count = tl.load(COUNTS + segment)
    if block * EVICTED < count:
        rank = block * EVICTED + tl.arange(0, EVICTED)
        slots = tl.load(LIST + segment * T + rank, mask=rank < count, other=0)
        base = segment_pointer(ADDRESSES, STARTS, segment, PER_LAYER, DTYPE, D)
        evicted_keys = load_rows(base, slots.to(tl.int64), rank < count, D, BLOCK_D)  # [EVICTED, BLOCK_D]
        best = tl.full((EVICTED,), float("-inf"), tl.float32)
        best_index = tl.zeros((EVICTED,), tl.int32)
        for trip in tl.range(0, TRIPS if TRIPS is not None else tl.cdiv(N, BLOCK)):
            index = trip * BLOCK + tl.arange(0, BLOCK)
            kept = tl.load(KEPT + segment * N + index, mask=index < N, other=-1)
            scale = tl.load(INVERSE_NORMS + segment * N + index, mask=index < N, other=0.0)
            kept_keys = load_rows(base, kept.to(tl.int64), kept >= 0, D, BLOCK_D)  # [BLOCK, BLOCK_D]
            block_best, block_index = _block_maximum(evicted_keys, kept_keys, scale, kept >= 0, UPCAST)
            best_index = tl.where(block_best > best, trip * BLOCK + block_index, best_index)
            best = tl.maximum(best, block_best)
        # Scaled last: a positive factor does not change which entry is nearest. -inf means that none was comparable.
        scaled = tl.where(best > float("-inf"), best * _inverse_norm(evicted_keys), float("-inf"))
        valid = tl.abs(scaled) < float("inf")
        tl.store(SIMILARITY + segment * T + slots, tl.where(valid, scaled, float("-inf")), mask=rank < count)
        tl.store(INDEX + segment * T + slots, tl.where(valid, best_index, 0).to(tl.int64), mask=rank < count)


@triton.jit
def _block_maximum(evicted_keys, kept_keys, scale, valid, UPCAST: tl.constexpr):
    """For each evicted key the largest product with a unit kept key, and the first column that has it."""
    if UPCAST:
        products = tl.dot(evicted_keys.to(tl.float32), tl.trans(kept_keys.to(tl.float32)), input_precision="ieee")
    else:
        products = tl.dot(evicted_keys, tl.trans(kept_keys), input_precision="ieee")
    products = products * scale[None, :]
    comparable = valid[None, :] & (tl.abs(products) < float("inf"))
    return tl.max(tl.where(comparable, products, float("-inf")), 1, return_indices=True)


def nearest(
    segments: Segments, keys: Column, kept: Tensor, evicted: Tensor, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """For every evicted slot, the kept slot whose key has the largest cosine similarity.

    Args:
        segments: P segments; all slots of `kept` and `evicted` are below its length.
        keys: bfloat16, float16 or float32, of up to 256 numbers.
        kept: [P, N] int32, slots; -1 = none, anywhere.
        evicted: [P, T] bool, T = `segments.longest`.
        out: both results, contiguous, written in place.

    Returns:
        The largest cosine similarity [P, T] float32, and its index in `kept` [P, T] int64, the lowest on ties; -inf and
        0 for slots that are not evicted or have no kept entry to compare with. Norms below 1e-6 count as 1e-6. Keys
        whose squared norm is not finite are not compared.

    Raises:
        UnsupportedInputError: the kernels do not support these inputs; nothing was written.
    """
    device, count, longest, width = keys.addresses.device, segments.count, segments.longest, kept.shape[-1]
    _check(segments, keys, kept, evicted)
    if out is None:
        out = (
            torch.empty((count, longest), dtype=torch.float32, device=device),
            torch.empty((count, longest), dtype=torch.int64, device=device),
        )
    check_tensor("similarities", out[0], torch.float32, (count, longest), device)
    check_tensor("indices", out[1], torch.int64, (count, longest), device)
    if not out[0].numel():
        return out
    listed = torch.empty((count, longest), dtype=torch.int32, device=device)
    counts = torch.empty(count, dtype=torch.int32, device=device)
    inverse_norms = torch.empty((count, width), dtype=torch.float32, device=device)
    sizes, tiling = (longest, width, segments.per_layer), _Tiling.of(keys.dtype)
    _prepare[count, 1 + cdiv(width, _ENTRIES)](
        *(keys.addresses, segments.starts, kept, evicted, listed, counts, inverse_norms, *out, *sizes),
        **row_constants(keys, ENTRIES=_ENTRIES, LISTED=_BLOCK_LISTED),
    )
    _nearest[grid_of(segments, tiling.evicted)](
        *(keys.addresses, segments.starts, kept, listed, counts, inverse_norms, *out, *sizes),
        **tiling.constants(keys),
        TRIPS=trips_of(cdiv(width, tiling.kept)),
        UPCAST=interpreting(),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return out


def _check(segments: Segments, keys: Column, kept: Tensor, evicted: Tensor) -> None:
    device = keys.addresses.device
    check_device(device)
    require(keys.dtype in TYPES, f"keys of {keys.dtype}")
    require(1 <= keys.width <= _MAX_WIDTH, f"head dim {keys.width}, not 1 to {_MAX_WIDTH}")
    check_segments(segments, device)
    check_tensor("addresses", keys.addresses, torch.int64, (segments.layers,), device)
    check_tensor("kept", kept, torch.int32, (segments.count, kept.shape[-1]), device)
    check_tensor("evicted", evicted, torch.bool, (segments.count, segments.longest), device)


@attrs.frozen
class _Tiling:
    """Block sizes: a block of evicted entries is compared with blocks of kept entries."""

    evicted: int
    kept: int
    stages: int
    warps: int = 4

    @classmethod
    def of(cls, dtype: torch.dtype) -> "_Tiling":
        # Without tensor cores the operands are in registers.
        return cls(32, 32, stages=2, warps=8) if dtype == torch.float32 else cls(64, 64, stages=3)

    def constants(self, keys: Column) -> dict[str, object]:
        return row_constants(keys, EVICTED=self.evicted, BLOCK=self.kept)


def traffic(segments: Segments, keys: Column, width: int, kept: Sequence[int], evicted: Sequence[int]) -> Traffic:
    """Bytes that `nearest` moves.

    Args:
        segments: P segments; lengths are not looked at.
        keys: their keys.
        width: N, slots per segment that `kept` has room for.
        kept: [P], number of kept slots.
        evicted: [P], number of evicted slots.
    """
    blocks = [cdiv(count, _Tiling.of(keys.dtype).evicted) for count in evicted]
    compared = sum(count * repeats for count, repeats in zip(kept, blocks, strict=True))
    rows, slots = sum(kept) + compared + sum(evicted), segments.count * segments.longest
    read = {
        "keys": rows * keys.width * keys.dtype.itemsize,
        "kept": 4 * width * (segments.count + sum(blocks)),
        "evicted": slots,
    }
    results = slots + sum(evicted)  # all are filled, then those of evicted slots are written
    return Traffic(read, {"similarity": 4 * results, "index": 8 * results}, launches=2)


def compile_specs() -> Iterator[CompileSpec]:
    """The launches for bfloat16 keys of the usual head dims, and for float32 ones."""
    for dtype, dim in ((torch.bfloat16, 128), (torch.bfloat16, 64), (torch.float32, 128)):
        keys, tiling = Column(torch.empty(0, dtype=torch.float32), dtype, dim, ()), _Tiling.of(dtype)
        name = f"{str(dtype).removeprefix('torch.')} D={dim}"
        inputs = {"ADDRESSES": "*i64", "STARTS": "*i64", "KEPT": "*i32"}
        lists = {"LIST": "*i32", "COUNTS": "*i32", "INVERSE_NORMS": "*fp32", "SIMILARITY": "*fp32", "INDEX": "*i64"}
        sizes = {"T": "i32", "N": "i32", "PER_LAYER": "i32"}
        constants = row_constants(keys, ENTRIES=_ENTRIES, LISTED=_BLOCK_LISTED)
        tables = {**inputs, "EVICTED": "*i1", **lists}
        yield CompileSpec(f"nearest._prepare {name}", _prepare, {**tables, **sizes}, constants, tuple(tables))
        tables = {**inputs, **lists}
        yield CompileSpec(
            f"nearest._nearest {name}",
            _nearest,
            {**tables, **sizes},
            {**tiling.constants(keys), "TRIPS": None, "UPCAST": False},
            tuple(tables),
            tiling.warps,
            tiling.stages,
            tensor_cores=dtype != torch.float32,
        )
