"""R-KV's forgiven similarities (arXiv:2505.24133, section 3.3): `lookalikes.search`, then sums by target."""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.common.addressing import base_of, check_tensor, grid_of, place_of, row_constants, rows_at
from kvpolicy_kernels.common.compile_spec import Build
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import require
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.score.redundancy.similar_keys import CASES, check, search, search_builds, search_traffic

_ENTRIES = 32  # of one program that reads every key once
_SETTLED = 1024  # entries of one program that reads sums only
_MOST_ADDED = 1 << 22  # similarities of at most 1, so that their sum stays below 2^63 parts
_PARTS = tl.constexpr(float(1 << 40))  # of 1, in which similarities are summed


def forgiven(
    segments: Segments,
    keys: Column,
    *,
    threshold: float,
    forgive: int,
    end: str = "last",
    empty_row: str = "slot0",
    out: Tensor | None = None,
) -> Tensor:
    """Per entry, the sum of the cosine similarities of the entries that forgive it: [P, T] float32, 0 behind lengths.

    An entry forgives its `forgive` newest (`end` "last") or oldest ("first") look-alikes: those with a similarity above
    `threshold`, itself excepted. One that met none forgives the first slot when `empty_row` is "slot0", no one when it
    is "none". Every run gives the same bits, and memory grows with T only.

    Raises UnsupportedInputError, before anything is written, for dtypes, sizes and devices that the kernels cannot do.
    """
    device, shape = keys.addresses.device, (segments.count, segments.longest)
    out = torch.empty(shape, dtype=torch.float32, device=device) if out is None else out
    check(segments, keys, threshold, forgive, end)
    require(empty_row in ("slot0", "none"), f"empty_row {empty_row!r}")
    require(segments.longest * max(1, forgive) <= _MOST_ADDED, f"{segments.longest} entries: sums could overflow")
    check_tensor("out", out, torch.float32, shape, device)
    found = search(segments, keys, threshold=threshold, forgive=forgive, end=end)
    sums = torch.zeros(shape, dtype=torch.int64, device=device)
    spoilt = torch.zeros(segments.count, dtype=torch.int32, device=device)
    if out.numel():
        _credit[grid_of(segments, _ENTRIES)](
            *(keys.addresses, segments.starts, segments.lengths, found.inverses, found.targets, sums, spoilt),
            *(segments.longest, segments.per_layer),
            **row_constants(keys, ENTRIES=_ENTRIES, FORGIVE=forgive, EMPTY_TO_FIRST=empty_row == "slot0"),
        )
        _settle[grid_of(segments, _SETTLED)](sums, spoilt, segments.lengths, out, segments.longest, ENTRIES=_SETTLED)
    return out


def traffic(
    segments: Segments,
    lengths: Sequence[int],
    keys: Column,
    *,
    forgive: int,
    compared: int | None = None,
    pairs: int | None = None,
) -> Traffic:
    """Bytes that `forgiven` addresses in segments of these `lengths`; atomic additions to its sums are left out.

    How many columns are `compared` (the sum of `Search.compared`) and how many `pairs` forgive is known only
    afterwards; by default both are the most that can be.
    """
    entries = sum(lengths)
    pairs = entries * max(1, forgive) if pairs is None else pairs
    read = {
        "keys": (entries + pairs) * keys.width * keys.dtype.itemsize,
        "inverses": (entries + pairs) * 4,
        "targets": entries * forgive * 4,
        "sums": entries * 8,
        "spoilt": grid_of(segments, _SETTLED)[0] * 4,
    }
    credited = Traffic(read, {"out": segments.count * segments.longest * 4}, launches=2)
    return Traffic.total((search_traffic(segments, lengths, keys, forgive, compared), credited))


@triton.jit(do_not_specialize=["T", "PER_LAYER"])
def _credit(ADDRESSES, STARTS, LENGTHS, INVERSES, TARGETS, SUMS, SPOILT, T, PER_LAYER, DTYPE: tl.constexpr,
            D: tl.constexpr, BLOCK_D: tl.constexpr, ENTRIES: tl.constexpr, FORGIVE: tl.constexpr,
            EMPTY_TO_FIRST: tl.constexpr):  # fmt: skip
    """SUMS [P, T] int64 += similarity, at the targets of ENTRIES rows. Integers: any order gives the same bits."""
    segment, block = place_of(T, ENTRIES)
    length = tl.load(LENGTHS + segment)
    if block * ENTRIES < length:
        rows = block * ENTRIES + tl.arange(0, ENTRIES)
        base = base_of(ADDRESSES, STARTS, segment, PER_LAYER, DTYPE, D)
        ours = rows_at(base, rows, rows < length, D, BLOCK_D).to(tl.float32)
        scale = tl.load(INVERSES + segment * T + rows, mask=rows < length, other=0.0)
        sums = SUMS + segment * T
        for place in range(FORGIVE if FORGIVE > 0 else 1):
            targets = tl.full((ENTRIES,), -1, tl.int32)
            if FORGIVE > 0:
                targets = tl.load(TARGETS + (segment * T + rows) * FORGIVE + place, mask=rows < length, other=-1)
            if EMPTY_TO_FIRST:  # the first entry has nothing to forgive itself
                targets = tl.where((targets < 0) & (place == 0) & (rows > 0) & (rows < length), 0, targets)
            theirs = rows_at(base, targets, targets >= 0, D, BLOCK_D).to(tl.float32)
            other = tl.load(INVERSES + segment * T + targets, mask=targets >= 0, other=0.0)
            values = tl.sum(ours * theirs, 1) * scale * other
            values = tl.where((scale == 0.0) | (other == 0.0), 0.0, values)  # norms beyond float32: no inf times 0
            strange = ~(tl.abs(values) < float("inf"))
            if tl.max(strange.to(tl.int32)) > 0:  # only the first slot is forgiven by what is like nobody
                tl.store(SPOILT + segment, 1)
            whole = (tl.where(strange, 0.0, values) * _PARTS).to(tl.int64)
            # Many may forgive the first slot: one addition for all of them.
            tl.atomic_add(sums, tl.sum(tl.where(targets == 0, whole, 0)), sem="relaxed")
            tl.atomic_add(sums + targets, whole, mask=targets > 0, sem="relaxed")


@triton.jit(do_not_specialize=["T"])
def _settle(SUMS, SPOILT, LENGTHS, OUT, T, ENTRIES: tl.constexpr):
    """OUT [P, T] float32 of the integer SUMS."""
    segment, block = place_of(T, ENTRIES)
    slots = block * ENTRIES + tl.arange(0, ENTRIES)
    held = slots < tl.load(LENGTHS + segment)
    sums = tl.load(SUMS + segment * T + slots, mask=held, other=0).to(tl.float32) * (1.0 / _PARTS)
    spoilt = (slots == 0) & (tl.load(SPOILT + segment) > 0)
    tl.store(OUT + segment * T + slots, tl.where(spoilt, float("nan"), sums), mask=slots < T)


def builds() -> Iterator[Build]:
    """All launches of `forgiven`."""
    yield from search_builds()
    tables = {"ADDRESSES": "*i64", "STARTS": "*i64", "LENGTHS": "*i32", "INVERSES": "*fp32", "TARGETS": "*i32"}
    tables |= {"SUMS": "*i64", "SPOILT": "*i32"}
    for dtype, width, forgive in CASES:
        keys = Column(torch.empty(0, dtype=torch.float32), dtype, width, ())
        constants = row_constants(keys, ENTRIES=_ENTRIES, FORGIVE=forgive, EMPTY_TO_FIRST=True)
        name = f"redundancy._credit {str(dtype).removeprefix('torch.')} D={width} forgive={forgive}"
        yield Build(name, _credit, {**tables, "T": "i32", "PER_LAYER": "i32"}, constants, tuple(tables))
    tables = {"SUMS": "*i64", "SPOILT": "*i32", "LENGTHS": "*i32", "OUT": "*fp32"}
    constants = {"ENTRIES": _SETTLED}  # rows of [P, T] begin anywhere, so nothing can be loaded 16 bytes at a time
    yield Build("redundancy._settle", _settle, {**tables, "T": "i32"}, constants, tuple(tables), wide_loads=False)
