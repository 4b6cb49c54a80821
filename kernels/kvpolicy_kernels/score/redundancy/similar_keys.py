"""Which keys look alike: R-KV's search (arXiv:2505.24133, section 3.3) without a matrix of T by T."""

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
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import interpreting, require
from kvpolicy_kernels.common.traffic import Traffic

_MOST_FORGIVEN = 16
_WIDEST = 256
_ENTRIES = 32  # of one program that reads every key once
CASES = ((torch.bfloat16, 128, 1), (torch.bfloat16, 64, 1), (torch.bfloat16, 128, 2), (torch.float32, 128, 1))


@attrs.frozen(eq=False)
class Search:
    """What `search` found."""

    targets: Tensor  # [P, T, forgive] int32, the slots that an entry forgives in the order of the search; -1 behind
    compared: Tensor  # [P, row blocks] int32, columns that the entries of a block were compared with
    inverses: Tensor  # [P, T] float32, 1 / (|key| + 1e-8), NaN for a key that is not finite


def search(segments: Segments, keys: Column, *, threshold: float, forgive: int, end: str = "last") -> Search:
    """The `forgive` newest (`end` "last") or oldest ("first") look-alikes of every entry.

    Two entries look alike when the cosine similarity of their keys is above `threshold`. A block of entries is compared
    with blocks of columns until all of them have met theirs; memory grows with T only.

    Raises UnsupportedInputError, before anything is written, for dtypes, sizes and devices that the kernels cannot do.
    """
    check(segments, keys, threshold, forgive, end)
    tiling = _Tiling.of(keys.dtype, forgive)
    device, shape = keys.addresses.device, (segments.count, segments.longest)
    found = Search(
        torch.empty((*shape, forgive), dtype=torch.int32, device=device),
        torch.empty((segments.count, cdiv(segments.longest, tiling.rows)), dtype=torch.int32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
    )
    if not found.inverses.numel():
        return found
    place = (keys.addresses, segments.starts, segments.lengths, found.inverses)
    sizes = (segments.longest, segments.per_layer)
    _invert[grid_of(segments, _ENTRIES)](*place, *sizes, **row_constants(keys, ENTRIES=_ENTRIES))
    _search[grid_of(segments, tiling.rows)](
        *(*place, found.targets, found.compared, *sizes, float(threshold)),
        **row_constants(keys, **tiling.constants, FORGIVE=forgive, NEWEST_FIRST=end == "last"),
        UPCAST=interpreting(),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return found


def check(segments: Segments, keys: Column, threshold: float, forgive: int, end: str) -> None:
    """Raise UnsupportedInputError for what the kernels cannot do."""
    device = keys.addresses.device
    check_device(device)
    require(keys.dtype in TYPES, f"keys of {keys.dtype}")
    require(1 <= keys.width <= _WIDEST, f"head dim {keys.width}, not 1 to {_WIDEST}")
    require(0 <= forgive <= _MOST_FORGIVEN, f"forgive {forgive}, not 0 to {_MOST_FORGIVEN}")
    require(threshold >= 0, f"threshold {threshold}: empty slots would look alike")
    require(end in ("last", "first"), f"end {end!r}")
    require(segments.longest < 1 << 30, f"{segments.longest} entries in a segment")
    check_segments(segments, device)
    check_tensor("addresses", keys.addresses, torch.int64, (segments.layers,), device)


def search_traffic(
    segments: Segments, lengths: Sequence[int], keys: Column, forgive: int, compared: int | None = None
) -> Traffic:
    """Bytes that `search` addresses in segments of these `lengths`.

    How many columns are `compared` (the sum of `Search.compared`) is known only afterwards; by default it is the most
    that can be.
    """
    rows, entries = _Tiling.of(keys.dtype, forgive).rows, sum(lengths)
    compared = sum(cdiv(length, rows) * length for length in lengths) if compared is None else compared
    read = {"keys": (2 * entries + compared) * keys.width * keys.dtype.itemsize, "inverses": (entries + compared) * 4}
    written = {"inverses": entries * 4, "targets": entries * forgive * 4, "compared": grid_of(segments, rows)[0] * 4}
    return Traffic(read, written, launches=2)


@triton.jit(do_not_specialize=["T", "PER_LAYER"])
def _invert(ADDRESSES, STARTS, LENGTHS, INVERSES, T, PER_LAYER, DTYPE: tl.constexpr, D: tl.constexpr,
            BLOCK_D: tl.constexpr, ENTRIES: tl.constexpr):  # fmt: skip
    """INVERSES [P, T] = 1 / (|key| + 1e-8); NaN for keys that are not finite."""
    segment, block = place_of(T, ENTRIES)
    length = tl.load(LENGTHS + segment)
    slots = block * ENTRIES + tl.arange(0, ENTRIES)
    if block * ENTRIES < length:
        base = base_of(ADDRESSES, STARTS, segment, PER_LAYER, DTYPE, D)
        keys = rows_at(base, slots, slots < length, D, BLOCK_D).to(tl.float32)  # [ENTRIES, BLOCK_D]
        finite = tl.min((tl.abs(keys) < float("inf")).to(tl.int32), 1)
        inverses = tl.where(finite > 0, 1.0 / (tl.sqrt(tl.sum(keys * keys, 1)) + 1e-8), float("nan"))
        tl.store(INVERSES + segment * T + slots, inverses, mask=slots < length)


@triton.jit(do_not_specialize=["T", "PER_LAYER"])
def _search(ADDRESSES, STARTS, LENGTHS, INVERSES, TARGETS, COMPARED, T, PER_LAYER, THRESHOLD, DTYPE: tl.constexpr,
            D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
            FORGIVE: tl.constexpr, NEWEST_FIRST: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """TARGETS [P, T, FORGIVE] of ROWS entries, and how many columns these were COMPARED with."""
    segment, block = place_of(T, ROWS)
    length = tl.load(LENGTHS + segment)
    if block * ROWS < length:
        rows = block * ROWS + tl.arange(0, ROWS)
        base = base_of(ADDRESSES, STARTS, segment, PER_LAYER, DTYPE, D)
        ours = rows_at(base, rows, rows < length, D, BLOCK_D)  # [ROWS, BLOCK_D]
        inverses = INVERSES + segment * T
        scale = tl.load(inverses + rows, mask=rows < length, other=0.0)  # [ROWS]
        # For products scaled on one side only. A norm that is not finite looks like nobody: 0 or NaN is not above 0.
        limits = tl.where(scale > 0.0, THRESHOLD / tl.where(scale > 0.0, scale, 1.0), float("inf"))
        targets = TARGETS + (segment * T + rows) * FORGIVE
        met = tl.where(rows < length, 0, FORGIVE)
        chunks = tl.cdiv(length, CHUNK * COLUMNS)
        done = 0
        while (done < chunks) & (tl.min(met) < FORGIVE):
            first = length - (done + 1) * (CHUNK * COLUMNS) if NEWEST_FIRST else done * (CHUNK * COLUMNS)
            order = _alike(base, inverses, ours, rows, limits, first, length, D, BLOCK_D, COLUMNS, CHUNK, NEWEST_FIRST,
                           UPCAST)  # fmt: skip
            met = _take(order, met, targets, FORGIVE, NEWEST_FIRST)
            done += 1
        for place in range(FORGIVE):
            tl.store(targets + place, -1, mask=(rows < length) & (place >= met))
        tl.store(COMPARED + tl.program_id(0), tl.minimum(length, done * (CHUNK * COLUMNS)))
    else:
        tl.store(COMPARED + tl.program_id(0), 0)


@triton.jit
def _alike(base, inverses, ours, rows, limits, first, length, D: tl.constexpr, BLOCK_D: tl.constexpr,
           COLUMNS: tl.constexpr, CHUNK: tl.constexpr, NEWEST_FIRST: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Who of CHUNK blocks looks alike and comes first in a lane: [ROWS, COLUMNS] int32, more = earlier, -1 = none."""
    order = tl.full((ours.shape[0], COLUMNS), -1, tl.int32)
    for block in range(CHUNK):
        columns = first + block * COLUMNS + tl.arange(0, COLUMNS)
        held = (columns >= 0) & (columns < length)
        theirs = rows_at(base, columns, held, D, BLOCK_D)
        scale = tl.load(inverses + columns, mask=held, other=0.0)
        if UPCAST:
            products = tl.dot(ours.to(tl.float32), tl.trans(theirs.to(tl.float32)), input_precision="ieee")
        else:
            products = tl.dot(ours, tl.trans(theirs), input_precision="ieee")
        alike = (products * scale[None, :] > limits[:, None]) & (columns[None, :] != rows[:, None])
        order = tl.maximum(order, tl.where(alike, _rank(columns, NEWEST_FIRST)[None, :], -1))
    return order


@triton.jit
def _take(order, met, targets, FORGIVE: tl.constexpr, NEWEST_FIRST: tl.constexpr):
    """Store the first look-alikes of `order` [ROWS, COLUMNS] behind the `met` [ROWS] ones; the new `met`."""
    for _ in range(FORGIVE):
        best = tl.max(order, 1)
        wanted = (best >= 0) & (met < FORGIVE)
        tl.store(targets + met, _rank(best, NEWEST_FIRST), mask=wanted)
        met += wanted.to(tl.int32)
        order = tl.where(order == best[:, None], -1, order)
    return met


@triton.jit
def _rank(slots, NEWEST_FIRST: tl.constexpr):
    """Larger for slots that a search meets earlier, never negative; its own inverse."""
    return slots if NEWEST_FIRST else (1 << 30) - slots


@attrs.frozen
class _Tiling:
    """Shape of the search: a block of rows against chunks of blocks of columns."""

    rows: int
    columns: int
    chunk: int  # blocks between two looks at whether all rows are done
    stages: int
    warps: int = 4

    @classmethod
    def of(cls, dtype: torch.dtype, forgive: int) -> "_Tiling":
        # A lane of a chunk remembers one look-alike, so whoever wants several looks after every block.
        chunk = 4 if forgive == 1 else 1
        if dtype == torch.float32:  # without tensor cores the operands live in registers
            return cls(32, 32, chunk, stages=2)
        return cls(64, 64, chunk, stages=3)

    @property
    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns, "CHUNK": self.chunk}


def search_builds() -> Iterator[Build]:
    """The launches for bfloat16 keys of the usual head dims, for float32 ones, and for two look-alikes."""
    for dtype, width, forgive in CASES:
        tiling, keys = _Tiling.of(dtype, forgive), Column(torch.empty(0, dtype=torch.float32), dtype, width, ())
        name = f"{str(dtype).removeprefix('torch.')} D={width}"
        place = {"ADDRESSES": "*i64", "STARTS": "*i64", "LENGTHS": "*i32", "INVERSES": "*fp32"}
        sizes = {"T": "i32", "PER_LAYER": "i32"}
        if forgive == 1:
            constants = row_constants(keys, ENTRIES=_ENTRIES)
            yield Build(f"lookalikes._invert {name}", _invert, {**place, **sizes}, constants, tuple(place))
        constants = row_constants(keys, **tiling.constants, FORGIVE=forgive, NEWEST_FIRST=True, UPCAST=False)
        tables = {**place, "TARGETS": "*i32", "COMPARED": "*i32"}
        yield Build(
            f"lookalikes._search {name} forgive={forgive}",
            *(_search, {**tables, **sizes, "THRESHOLD": "fp32"}, constants, tuple(tables)),
            *(tiling.warps, tiling.stages),
            tensor_cores=dtype != torch.float32,
        )
