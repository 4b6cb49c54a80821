"""Search for similar keys within each head (R-KV, arXiv:2505.24133, section 3.3), without a T x T matrix.

Reference: tests/kernels/references/redundancy.py.
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
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import interpreting, require
from kvpolicy_kernels.common.traffic import Traffic

_MAX_LIMIT = 16
_MAX_WIDTH = 256
_ENTRIES = 32  # per program that reads every key once
COMPILED_CASES = ((torch.bfloat16, 128, 1), (torch.bfloat16, 64, 1), (torch.bfloat16, 128, 2), (torch.float32, 128, 1))


@attrs.frozen(eq=False)
class SimilarKeys:
    """Results of `find_similar`."""

    targets: Tensor  # [P, T, limit] int32, similar slots in the order of the search, padded with -1
    compared: Tensor  # [P, row blocks] int32, how many columns each block of rows was compared with
    inverse_norms: Tensor  # [P, T] float32, 1 / (|key| + 1e-8), NaN for a key with a NaN or infinity


def find_similar(segments: Segments, keys: Column, *, threshold: float, limit: int, end: str = "last") -> SimilarKeys:
    """For every entry, the `limit` newest or oldest other entries with similar keys.

    A block of entries (rows) is compared with blocks of entries (columns) until all rows have found `limit` of them.
    Memory is linear in T.

    Args:
        segments: P segments.
        keys: float32, bfloat16 or float16, up to 256 wide.
        threshold: keys with a larger cosine similarity are similar; not negative.
        limit: how many to find, up to 16.
        end: "last" to search from the newest entry backwards, "first" from the oldest one forwards.

    Raises:
        UnsupportedInputError: the kernels do not support these inputs; nothing was written.
    """
    check_inputs(segments, keys, threshold, limit, end)
    tiling = _Tiling.of(keys.dtype, limit)
    device, shape = keys.addresses.device, (segments.count, segments.longest)
    result = SimilarKeys(
        torch.empty((*shape, limit), dtype=torch.int32, device=device),
        torch.empty((segments.count, cdiv(segments.longest, tiling.rows)), dtype=torch.int32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
    )
    if not result.inverse_norms.numel():
        return result
    tables = (keys.addresses, segments.starts, segments.lengths, result.inverse_norms)
    sizes = (segments.longest, segments.per_layer)
    _inverse_norms[grid_of(segments, _ENTRIES)](*tables, *sizes, **row_constants(keys, ENTRIES=_ENTRIES))
    _find_similar[grid_of(segments, tiling.rows)](
        *(*tables, result.targets, result.compared, *sizes, float(threshold)),
        **row_constants(keys, **tiling.constants, LIMIT=limit, NEWEST_FIRST=end == "last"),
        UPCAST=interpreting(),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return result


def check_inputs(segments: Segments, keys: Column, threshold: float, limit: int, end: str) -> None:
    """Raise UnsupportedInputError for inputs that the kernels do not support."""
    device = keys.addresses.device
    check_device(device)
    require(keys.dtype in TYPES, f"keys of {keys.dtype}")
    require(1 <= keys.width <= _MAX_WIDTH, f"head dim {keys.width}, not 1 to {_MAX_WIDTH}")
    require(0 <= limit <= _MAX_LIMIT, f"limit {limit}, not 0 to {_MAX_LIMIT}")
    require(threshold >= 0, f"threshold {threshold}: empty slots would look alike")
    require(end in ("last", "first"), f"end {end!r}")
    require(segments.longest < 1 << 30, f"{segments.longest} entries in a segment")
    check_segments(segments, device)
    check_tensor("addresses", keys.addresses, torch.int64, (segments.layers,), device)


def find_similar_traffic(
    segments: Segments, lengths: Sequence[int], keys: Column, limit: int, compared: int | None = None
) -> Traffic:
    """Bytes that `find_similar` moves in segments of these `lengths`.

    `compared` is the sum of `SimilarKeys.compared`, which is known only afterwards; by default its upper bound.
    """
    rows, entries = _Tiling.of(keys.dtype, limit).rows, sum(lengths)
    compared = sum(cdiv(length, rows) * length for length in lengths) if compared is None else compared
    read = {
        "keys": (2 * entries + compared) * keys.width * keys.dtype.itemsize,
        "inverse_norms": (entries + compared) * 4,
    }
    written = {"inverse_norms": entries * 4, "targets": entries * limit * 4, "compared": grid_of(segments, rows)[0] * 4}
    return Traffic(read, written, launches=2)


@triton.jit(do_not_specialize=["T", "PER_LAYER"])
def _inverse_norms(ADDRESSES, STARTS, LENGTHS, INVERSE_NORMS, T, PER_LAYER, DTYPE: tl.constexpr, D: tl.constexpr,
            BLOCK_D: tl.constexpr, ENTRIES: tl.constexpr):  # fmt: skip
    """INVERSE_NORMS [P, T] = 1 / (|key| + 1e-8); NaN for keys with a NaN or infinity."""
    segment, block = segment_and_block(T, ENTRIES)
    length = tl.load(LENGTHS + segment)
    slots = block * ENTRIES + tl.arange(0, ENTRIES)
    if block * ENTRIES < length:
        base = segment_pointer(ADDRESSES, STARTS, segment, PER_LAYER, DTYPE, D)
        keys = load_rows(base, slots.to(tl.int64), slots < length, D, BLOCK_D).to(tl.float32)  # [ENTRIES, BLOCK_D]
        finite = tl.min((tl.abs(keys) < float("inf")).to(tl.int32), 1)
        inverse_norms = tl.where(finite > 0, 1.0 / (tl.sqrt(tl.sum(keys * keys, 1)) + 1e-8), float("nan"))
        tl.store(INVERSE_NORMS + segment * T + slots, inverse_norms, mask=slots < length)


@triton.jit(do_not_specialize=["T", "PER_LAYER"])
def _find_similar(ADDRESSES, STARTS, LENGTHS, INVERSE_NORMS, TARGETS, COMPARED, T, PER_LAYER, THRESHOLD,
                  DTYPE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr, CHUNK: tl.constexpr, LIMIT: tl.constexpr, NEWEST_FIRST: tl.constexpr,
                  UPCAST: tl.constexpr):  # fmt: skip
    """TARGETS [P, T, LIMIT] and COMPARED of a block of ROWS entries."""
    segment, block = segment_and_block(T, ROWS)
    length = tl.load(LENGTHS + segment)
    if block * ROWS < length:
        rows = block * ROWS + tl.arange(0, ROWS)
        base = segment_pointer(ADDRESSES, STARTS, segment, PER_LAYER, DTYPE, D)
        row_keys = load_rows(base, rows.to(tl.int64), rows < length, D, BLOCK_D)  # [ROWS, BLOCK_D]
        inverse_norms = INVERSE_NORMS + segment * T
        scale = tl.load(inverse_norms + rows, mask=rows < length, other=0.0)  # [ROWS]
        # Products are scaled by the column's norm only. A row without a finite norm finds nothing: its limit is inf.
        limits = tl.where(scale > 0.0, THRESHOLD / tl.where(scale > 0.0, scale, 1.0), float("inf"))
        targets = TARGETS + (segment * T + rows) * LIMIT
        found = tl.where(rows < length, 0, LIMIT)
        chunks = tl.cdiv(length, CHUNK * COLUMNS)
        done = 0
        while (done < chunks) & (tl.min(found) < LIMIT):
            first = length - (done + 1) * (CHUNK * COLUMNS) if NEWEST_FIRST else done * (CHUNK * COLUMNS)
            order = _first_similar(base, inverse_norms, row_keys, rows, limits, first, length, D, BLOCK_D, COLUMNS,
                                   CHUNK, NEWEST_FIRST, UPCAST)  # fmt: skip
            found = _store_first(order, found, targets, LIMIT, NEWEST_FIRST)
            done += 1
        for rank in range(LIMIT):
            tl.store(targets + rank, -1, mask=(rows < length) & (rank >= found))
        tl.store(COMPARED + tl.program_id(0), tl.minimum(length, done * (CHUNK * COLUMNS)))
    else:
        tl.store(COMPARED + tl.program_id(0), 0)


@triton.jit
def _first_similar(base, inverse_norms, row_keys, rows, limits, first, length, D: tl.constexpr,
                   BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, NEWEST_FIRST: tl.constexpr,
                   UPCAST: tl.constexpr):  # fmt: skip
    """Search rank of the first similar column per lane, int32 [ROWS, COLUMNS]; larger = earlier, -1 = none."""
    order = tl.full((row_keys.shape[0], COLUMNS), -1, tl.int32)
    for block in range(CHUNK):
        columns = first + block * COLUMNS + tl.arange(0, COLUMNS)
        valid = (columns >= 0) & (columns < length)
        column_keys = load_rows(base, columns.to(tl.int64), valid, D, BLOCK_D)
        scale = tl.load(inverse_norms + columns, mask=valid, other=0.0)
        if UPCAST:
            products = tl.dot(row_keys.to(tl.float32), tl.trans(column_keys.to(tl.float32)), input_precision="ieee")
        else:
            products = tl.dot(row_keys, tl.trans(column_keys), input_precision="ieee")
        similar = (products * scale[None, :] > limits[:, None]) & (columns[None, :] != rows[:, None])
        order = tl.maximum(order, tl.where(similar, _rank(columns, NEWEST_FIRST)[None, :], -1))
    return order


@triton.jit
def _store_first(order, found, targets, LIMIT: tl.constexpr, NEWEST_FIRST: tl.constexpr):
    """Append the first similar columns in `order` [ROWS, COLUMNS] to TARGETS; the updated `found` [ROWS]."""
    for _ in range(LIMIT):
        best = tl.max(order, 1)
        taken = (best >= 0) & (found < LIMIT)
        tl.store(targets + found, _rank(best, NEWEST_FIRST), mask=taken)
        found += taken.to(tl.int32)
        order = tl.where(order == best[:, None], -1, order)
    return found


@triton.jit
def _rank(slots, NEWEST_FIRST: tl.constexpr):
    """A number that is larger for slots that the search visits earlier, never negative; its own inverse."""
    return slots if NEWEST_FIRST else (1 << 30) - slots


@attrs.frozen
class _Tiling:
    """Block sizes: a block of rows is compared with chunks of blocks of columns."""

    rows: int
    columns: int
    chunk: int  # blocks between two checks whether all rows are done
    stages: int
    warps: int = 4

    @classmethod
    def of(cls, dtype: torch.dtype, limit: int) -> "_Tiling":
        # A lane keeps one similar column per chunk, so with a larger limit a chunk is one block.
        chunk = 4 if limit == 1 else 1
        if dtype == torch.float32:  # without tensor cores the operands are in registers
            return cls(32, 32, chunk, stages=2)
        return cls(64, 64, chunk, stages=3)

    @property
    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns, "CHUNK": self.chunk}


def find_similar_compile_specs() -> Iterator[CompileSpec]:
    """The launches for bfloat16 keys of usual head dims, for float32, and for a limit of two."""
    for dtype, width, limit in COMPILED_CASES:
        tiling, keys = _Tiling.of(dtype, limit), Column(torch.empty(0, dtype=torch.float32), dtype, width, ())
        name = f"{str(dtype).removeprefix('torch.')} D={width}"
        inputs = {"ADDRESSES": "*i64", "STARTS": "*i64", "LENGTHS": "*i32", "INVERSE_NORMS": "*fp32"}
        sizes = {"T": "i32", "PER_LAYER": "i32"}
        if limit == 1:
            constants = row_constants(keys, ENTRIES=_ENTRIES)
            yield CompileSpec(
                f"similar_keys._inverse_norms {name}", _inverse_norms, {**inputs, **sizes}, constants, tuple(inputs)
            )
        constants = row_constants(keys, **tiling.constants, LIMIT=limit, NEWEST_FIRST=True, UPCAST=False)
        tables = {**inputs, "TARGETS": "*i32", "COMPARED": "*i32"}
        yield CompileSpec(
            f"similar_keys._find_similar {name} limit={limit}",
            *(_find_similar, {**tables, **sizes, "THRESHOLD": "fp32"}, constants, tuple(tables)),
            *(tiling.warps, tiling.stages),
            tensor_cores=dtype != torch.float32,
        )
