"""The kept entry whose key points most alike, for every evicted one; no matrix of evicted by kept entries exists.

Reference: `kvpolicy_plugins.merging.nearest`.
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
    base_of,
    check_device,
    check_segments,
    check_tensor,
    grid_of,
    place_of,
    row_constants,
    rows_at,
)
from kvpolicy_kernels.common.compile_spec import Build
from kvpolicy_kernels.common.launch import trips_of
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import interpreting, require
from kvpolicy_kernels.common.traffic import Traffic

_WIDEST = 256
_LISTED = 1024  # slots that are looked at together for evicted ones
_ENTRIES = 32  # kept ones whose norm one program computes


@triton.jit(do_not_specialize=["T", "N", "PER_LAYER"])
def _prepare(ADDRESSES, STARTS, KEPT, EVICTED, LIST, COUNTS, INVERSES, SIMILARITY, PLACE, T, N, PER_LAYER,
             DTYPE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ENTRIES: tl.constexpr,
             LISTED: tl.constexpr):  # fmt: skip
    """The first program of a segment lists what is evicted, the others compute 1 / |key| of what is kept."""
    segment = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if part == 0:
        _list(EVICTED + segment * T, LIST + segment * T, COUNTS + segment, SIMILARITY + segment * T,
              PLACE + segment * T, T, LISTED)  # fmt: skip
    else:
        place = (part - 1) * ENTRIES + tl.arange(0, ENTRIES)
        slots = tl.load(KEPT + segment * N + place, mask=place < N, other=-1)
        base = base_of(ADDRESSES, STARTS, segment, PER_LAYER, DTYPE, D)
        inverses = _inverses(rows_at(base, slots, slots >= 0, D, BLOCK_D))
        tl.store(INVERSES + segment * N + place, inverses, mask=place < N)


@triton.jit
def _list(evicted, listed, count, similarity, place, T, LISTED: tl.constexpr):
    """The evicted slots in ascending order, and results as they are where there is nothing near."""
    found = 0
    first = 0
    while first < T:
        slots = first + tl.arange(0, LISTED)
        mask = tl.load(evicted + slots, mask=slots < T, other=0).to(tl.int32)
        rank = found + tl.cumsum(mask, 0) - 1
        tl.store(listed + rank, slots, mask=mask > 0)
        tl.store(similarity + slots, tl.full((LISTED,), float("-inf"), tl.float32), mask=slots < T)
        tl.store(place + slots, tl.zeros((LISTED,), tl.int64), mask=slots < T)
        found += tl.sum(mask, 0)
        first += LISTED
    tl.store(count, found)


@triton.jit
def _inverses(keys):
    """1 / |key| of keys [BLOCK, BLOCK_D], of at least 1e-6; NaN for keys that are not finite, nor is their norm."""
    keys = keys.to(tl.float32)
    square = tl.sum(keys * keys, 1)
    return tl.where(square < float("inf"), 1.0 / tl.maximum(tl.sqrt(square), 1e-6), float("nan"))


@triton.jit(do_not_specialize=["T", "N", "PER_LAYER"])
def _nearest(ADDRESSES, STARTS, KEPT, LIST, COUNTS, INVERSES, SIMILARITY, PLACE, T, N, PER_LAYER, DTYPE: tl.constexpr,
             D: tl.constexpr, BLOCK_D: tl.constexpr, EVICTED: tl.constexpr, BLOCK: tl.constexpr, TRIPS: tl.constexpr,
             UPCAST: tl.constexpr):  # fmt: skip
    """SIMILARITY and PLACE [P, T] of EVICTED evicted entries: a running maximum over blocks of kept ones."""
    segment, block = place_of(T, EVICTED)
    count = tl.load(COUNTS + segment)
    if block * EVICTED < count:
        rank = block * EVICTED + tl.arange(0, EVICTED)
        slots = tl.load(LIST + segment * T + rank, mask=rank < count, other=0)
        base = base_of(ADDRESSES, STARTS, segment, PER_LAYER, DTYPE, D)
        ours = rows_at(base, slots, rank < count, D, BLOCK_D)  # [EVICTED, BLOCK_D]
        best = tl.full((EVICTED,), float("-inf"), tl.float32)
        where = tl.zeros((EVICTED,), tl.int32)
        for trip in tl.range(0, TRIPS if TRIPS is not None else tl.cdiv(N, BLOCK)):
            place = trip * BLOCK + tl.arange(0, BLOCK)
            kept = tl.load(KEPT + segment * N + place, mask=place < N, other=-1)
            scale = tl.load(INVERSES + segment * N + place, mask=place < N, other=0.0)
            theirs = rows_at(base, kept, kept >= 0, D, BLOCK_D)  # [BLOCK, BLOCK_D]
            most, at = _most_alike(ours, theirs, scale, kept >= 0, UPCAST)
            where = tl.where(most > best, trip * BLOCK + at, where)
            best = tl.maximum(best, most)
        # Scaled last: a common positive factor does not change who is nearest. Who met nobody stays at -inf.
        scaled = tl.where(best > float("-inf"), best * _inverses(ours), float("-inf"))
        met = tl.abs(scaled) < float("inf")
        tl.store(SIMILARITY + segment * T + slots, tl.where(met, scaled, float("-inf")), mask=rank < count)
        tl.store(PLACE + segment * T + slots, tl.where(met, where, 0).to(tl.int64), mask=rank < count)


@triton.jit
def _most_alike(ours, theirs, scale, there, UPCAST: tl.constexpr):
    """The largest product of each of our rows with a unit row of theirs, and the first column where it is."""
    if UPCAST:
        products = tl.dot(ours.to(tl.float32), tl.trans(theirs.to(tl.float32)), input_precision="ieee")
    else:
        products = tl.dot(ours, tl.trans(theirs), input_precision="ieee")
    products = products * scale[None, :]
    comparable = there[None, :] & (tl.abs(products) < float("inf"))
    return tl.max(tl.where(comparable, products, float("-inf")), 1, return_indices=True)


def nearest(
    segments: Segments, keys: Column, kept: Tensor, evicted: Tensor, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The kept slot whose key points most alike, for every evicted slot.

    Args:
        segments: P segments; no slot of `kept` or `evicted` lies behind a segment's length.
        keys: bfloat16, float16 or float32, of up to 256 numbers.
        kept: [P, N] int32, slots; -1 anywhere is nobody.
        evicted: [P, T] bool, T = `segments.longest`.
        out: what is returned, contiguous.

    Returns:
        The largest cosine similarity [P, T] float32 and its place in `kept` [P, T] int64, the lowest one of equals.
        -inf and 0 for slots that are not evicted and where there is nobody. A norm below 1e-6 counts as 1e-6. A key
        that is not finite, or whose square is not, is near nobody.

    Raises:
        UnsupportedInputError: nothing was written.
    """
    device, count, longest, width = keys.addresses.device, segments.count, segments.longest, kept.shape[-1]
    _check(segments, keys, kept, evicted)
    if out is None:
        out = (
            torch.empty((count, longest), dtype=torch.float32, device=device),
            torch.empty((count, longest), dtype=torch.int64, device=device),
        )
    check_tensor("similarities", out[0], torch.float32, (count, longest), device)
    check_tensor("places", out[1], torch.int64, (count, longest), device)
    if not out[0].numel():
        return out
    listed = torch.empty((count, longest), dtype=torch.int32, device=device)
    counts = torch.empty(count, dtype=torch.int32, device=device)
    inverses = torch.empty((count, width), dtype=torch.float32, device=device)
    sizes, tiling = (longest, width, segments.per_layer), _Tiling.of(keys.dtype)
    _prepare[count, 1 + cdiv(width, _ENTRIES)](
        *(keys.addresses, segments.starts, kept, evicted, listed, counts, inverses, *out, *sizes),
        **row_constants(keys, ENTRIES=_ENTRIES, LISTED=_LISTED),
    )
    _nearest[grid_of(segments, tiling.evicted)](
        *(keys.addresses, segments.starts, kept, listed, counts, inverses, *out, *sizes),
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
    require(1 <= keys.width <= _WIDEST, f"head dim {keys.width}, not 1 to {_WIDEST}")
    check_segments(segments, device)
    check_tensor("addresses", keys.addresses, torch.int64, (segments.layers,), device)
    check_tensor("kept", kept, torch.int32, (segments.count, kept.shape[-1]), device)
    check_tensor("evicted", evicted, torch.bool, (segments.count, segments.longest), device)


@attrs.frozen
class _Tiling:
    """A block of evicted entries against blocks of kept ones."""

    evicted: int
    kept: int
    stages: int
    warps: int = 4

    @classmethod
    def of(cls, dtype: torch.dtype) -> "_Tiling":
        # Without tensor cores the operands live in registers.
        return cls(32, 32, stages=2, warps=8) if dtype == torch.float32 else cls(64, 64, stages=3)

    def constants(self, keys: Column) -> dict[str, object]:
        return row_constants(keys, EVICTED=self.evicted, BLOCK=self.kept)


def traffic(segments: Segments, keys: Column, width: int, kept: Sequence[int], evicted: Sequence[int]) -> Traffic:
    """Bytes of `nearest`.

    Args:
        segments: P segments; lengths are not looked at.
        keys: their keys.
        width: N, slots per segment that `kept` has room for.
        kept: [P], slots that are kept.
        evicted: [P], slots that are evicted.
    """
    blocks = [cdiv(count, _Tiling.of(keys.dtype).evicted) for count in evicted]
    compared = sum(count * repeats for count, repeats in zip(kept, blocks, strict=True))
    rows, slots = sum(kept) + compared + sum(evicted), segments.count * segments.longest
    read = {
        "keys": rows * keys.width * keys.dtype.itemsize,
        "kept": 4 * width * (segments.count + sum(blocks)),
        "evicted": slots,
    }
    results = slots + sum(evicted)  # filled, then those that are evicted
    return Traffic(read, {"similarity": 4 * results, "place": 8 * results}, launches=2)


def builds() -> Iterator[Build]:
    """The launches for bfloat16 keys of the usual head dims, and for float32 ones."""
    for dtype, dim in ((torch.bfloat16, 128), (torch.bfloat16, 64), (torch.float32, 128)):
        keys, tiling = Column(torch.empty(0, dtype=torch.float32), dtype, dim, ()), _Tiling.of(dtype)
        name = f"{str(dtype).removeprefix('torch.')} D={dim}"
        place = {"ADDRESSES": "*i64", "STARTS": "*i64", "KEPT": "*i32"}
        lists = {"LIST": "*i32", "COUNTS": "*i32", "INVERSES": "*fp32", "SIMILARITY": "*fp32", "PLACE": "*i64"}
        sizes = {"T": "i32", "N": "i32", "PER_LAYER": "i32"}
        constants = row_constants(keys, ENTRIES=_ENTRIES, LISTED=_LISTED)
        tables = {**place, "EVICTED": "*i1", **lists}
        yield Build(f"nearest._prepare {name}", _prepare, {**tables, **sizes}, constants, tuple(tables))
        tables = {**place, **lists}
        yield Build(
            f"nearest._nearest {name}",
            _nearest,
            {**tables, **sizes},
            {**tiling.constants(keys), "TRIPS": None, "UPCAST": False},
            tuple(tables),
            tiling.warps,
            tiling.stages,
            tensor_cores=dtype != torch.float32,
        )
