"""Similarity that R-KV does not count against an entry (arXiv:2505.24133, section 3.3).

R-KV keeps the newest of several similar keys: each entry "forgives" the similarity of its newest similar entries.
`similar_keys` finds these; here their similarities are summed per forgiven entry.

Reference: tests/kernels/references/redundancy.py.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.common.addressing import (
    check_tensor,
    grid_of,
    load_rows,
    row_constants,
    segment_and_block,
    segment_pointer,
)
from kvpolicy_kernels.common.compile_spec import CompileSpec
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import require
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.score.redundancy.similar_keys import (
    COMPILED_CASES,
    check_inputs,
    find_similar,
    find_similar_compile_specs,
    find_similar_traffic,
)

_ENTRIES = 32  # per program that reads every key once
_SUM_ENTRIES = 1024  # per program that converts sums
_MAX_ADDED = 1 << 22  # similarities of at most 1 each: their fixed-point sum stays below 2^63
_SCALE = tl.constexpr(float(1 << 40))  # fixed-point scale of the sums


def forgiven_similarity(
    segments: Segments,
    keys: Column,
    *,
    threshold: float,
    forgive: int,
    end: str = "last",
    empty_row: str = "slot0",
    out: Tensor | None = None,
) -> Tensor:
    """Per entry, the sum of the cosine similarities of the entries that forgive it.

    Every entry forgives the first `forgive` similar entries of its search. Results are the same bits in every run, and
    memory is linear in T.

    Args:
        segments: P segments.
        keys: float32, bfloat16 or float16, up to 256 wide.
        threshold: keys with a larger cosine similarity are similar; not negative.
        forgive: how many entries each entry forgives, up to 16.
        end: "last" to search from the newest entry backwards, "first" from the oldest one forwards.
        empty_row: what an entry without similar ones forgives: the first slot ("slot0", as the published code does)
            or nothing ("none").
        out: [P, T] float32 contiguous, written in place.

    Returns:
        [P, T] float32, 0 beyond the lengths.

    Raises:
        UnsupportedInputError: the kernels do not support these inputs; nothing was written.
    """
    device, shape = keys.addresses.device, (segments.count, segments.longest)
    out = torch.empty(shape, dtype=torch.float32, device=device) if out is None else out
    check_inputs(segments, keys, threshold, forgive, end)
    require(empty_row in ("slot0", "none"), f"empty_row {empty_row!r}")
    require(segments.longest * max(1, forgive) <= _MAX_ADDED, f"{segments.longest} entries: sums could overflow")
    check_tensor("out", out, torch.float32, shape, device)
    similar = find_similar(segments, keys, threshold=threshold, limit=forgive, end=end)
    sums = torch.zeros(shape, dtype=torch.int64, device=device)
    has_nan = torch.zeros(segments.count, dtype=torch.int32, device=device)
    if out.numel():
        _add_forgiven[grid_of(segments, _ENTRIES)](
            *(keys.addresses, segments.starts, segments.lengths, similar.inverse_norms, similar.targets, sums, has_nan),
            *(segments.longest, segments.per_layer),
            **row_constants(keys, ENTRIES=_ENTRIES, FORGIVE=forgive, EMPTY_TO_FIRST=empty_row == "slot0"),
        )
        _to_float[grid_of(segments, _SUM_ENTRIES)](
            sums, has_nan, segments.lengths, out, segments.longest, ENTRIES=_SUM_ENTRIES
        )
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
    """Bytes that `forgiven_similarity` moves in segments of these `lengths`, without its atomic additions.

    `compared` is the sum of `SimilarKeys.compared` and `pairs` how many entries are forgiven in total; both are known
    only afterwards, and by default their upper bounds.
    """
    entries = sum(lengths)
    pairs = entries * max(1, forgive) if pairs is None else pairs
    read = {
        "keys": (entries + pairs) * keys.width * keys.dtype.itemsize,
        "inverse_norms": (entries + pairs) * 4,
        "targets": entries * forgive * 4,
        "sums": entries * 8,
        "has_nan": grid_of(segments, _SUM_ENTRIES)[0] * 4,
    }
    sums_traffic = Traffic(read, {"out": segments.count * segments.longest * 4}, launches=2)
    return Traffic.total((find_similar_traffic(segments, lengths, keys, forgive, compared), sums_traffic))


@triton.jit(do_not_specialize=["T", "PER_LAYER"])
def _add_forgiven(ADDRESSES, STARTS, LENGTHS, INVERSE_NORMS, TARGETS, SUMS, HAS_NAN, T, PER_LAYER,
                  DTYPE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ENTRIES: tl.constexpr,
                  FORGIVE: tl.constexpr, EMPTY_TO_FIRST: tl.constexpr):  # fmt: skip
    """SUMS [P, T] += similarity at the targets of ENTRIES rows. Fixed-point int64: any order gives the same bits."""
    segment, block = segment_and_block(T, ENTRIES)
    length = tl.load(LENGTHS + segment)
    if block * ENTRIES < length:
        rows = block * ENTRIES + tl.arange(0, ENTRIES)
        base = segment_pointer(ADDRESSES, STARTS, segment, PER_LAYER, DTYPE, D)
        row_keys = load_rows(base, rows.to(tl.int64), rows < length, D, BLOCK_D).to(tl.float32)
        row_inverse = tl.load(INVERSE_NORMS + segment * T + rows, mask=rows < length, other=0.0)
        sums = SUMS + segment * T
        for rank in range(FORGIVE if FORGIVE > 0 else 1):
            targets = tl.full((ENTRIES,), -1, tl.int32)
            if FORGIVE > 0:
                targets = tl.load(TARGETS + (segment * T + rows) * FORGIVE + rank, mask=rows < length, other=-1)
            if EMPTY_TO_FIRST:  # the first entry does not forgive itself
                targets = tl.where((targets < 0) & (rank == 0) & (rows > 0) & (rows < length), 0, targets)
            target_keys = load_rows(base, targets.to(tl.int64), targets >= 0, D, BLOCK_D).to(tl.float32)
            target_inverse = tl.load(INVERSE_NORMS + segment * T + targets, mask=targets >= 0, other=0.0)
            values = tl.sum(row_keys * target_keys, 1) * row_inverse * target_inverse
            values = tl.where((row_inverse == 0.0) | (target_inverse == 0.0), 0.0, values)  # infinite norms: no inf · 0
            not_finite = ~(tl.abs(values) < float("inf"))
            if tl.max(not_finite.to(tl.int32)) > 0:  # rows without similar entries: their target is the first slot
                tl.store(HAS_NAN + segment, 1)
            fixed_point = (tl.where(not_finite, 0.0, values) * _SCALE).to(tl.int64)
            # Many rows may forgive the first slot: one atomic addition for all of them.
            tl.atomic_add(sums, tl.sum(tl.where(targets == 0, fixed_point, 0)), sem="relaxed")
            tl.atomic_add(sums + targets, fixed_point, mask=targets > 0, sem="relaxed")


@triton.jit(do_not_specialize=["T"])
def _to_float(SUMS, HAS_NAN, LENGTHS, OUT, T, ENTRIES: tl.constexpr):
    """OUT [P, T] float32 from the fixed-point SUMS."""
    segment, block = segment_and_block(T, ENTRIES)
    slots = block * ENTRIES + tl.arange(0, ENTRIES)
    valid = slots < tl.load(LENGTHS + segment)
    sums = tl.load(SUMS + segment * T + slots, mask=valid, other=0).to(tl.float32) * (1.0 / _SCALE)
    is_nan = (slots == 0) & (tl.load(HAS_NAN + segment) > 0)
    tl.store(OUT + segment * T + slots, tl.where(is_nan, float("nan"), sums), mask=slots < T)


def compile_specs() -> Iterator[CompileSpec]:
    """All launches of `forgiven_similarity`."""
    yield from find_similar_compile_specs()
    tables = {"ADDRESSES": "*i64", "STARTS": "*i64", "LENGTHS": "*i32", "INVERSE_NORMS": "*fp32", "TARGETS": "*i32"}
    tables |= {"SUMS": "*i64", "HAS_NAN": "*i32"}
    for dtype, width, forgive in COMPILED_CASES:
        keys = Column(torch.empty(0, dtype=torch.float32), dtype, width, ())
        constants = row_constants(keys, ENTRIES=_ENTRIES, FORGIVE=forgive, EMPTY_TO_FIRST=True)
        name = f"redundancy._add_forgiven {str(dtype).removeprefix('torch.')} D={width} forgive={forgive}"
        yield CompileSpec(name, _add_forgiven, {**tables, "T": "i32", "PER_LAYER": "i32"}, constants, tuple(tables))
    tables = {"SUMS": "*i64", "HAS_NAN": "*i32", "LENGTHS": "*i32", "OUT": "*fp32"}
    constants = {
        "ENTRIES": _SUM_ENTRIES
    }  # rows of [P, T] may start at any offset, so loads of 16 bytes are not possible
    yield CompileSpec(
        "redundancy._to_float", _to_float, {**tables, "T": "i32"}, constants, tuple(tables), wide_loads=False
    )
