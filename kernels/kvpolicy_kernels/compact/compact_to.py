"""Compaction into other storages, for example from a dense to a ragged layout; keeps the order of entries."""

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.common.addressing import row_pointers
from kvpolicy_kernels.common.compile_spec import CompileSpec
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.compact.raw_entries import (
    ARGUMENT_TYPES,
    COUNT_BLOCK,
    RawEntries,
    constants,
    count_below,
    integer_pointer,
)

_ROWS = 32  # entries per program


@triton.jit(do_not_specialize=["N"])
def copy_kept(
    ADDRESSES,  # a tuple of [L] int64, one a column
    STARTS,  # [P] int64
    TARGETS,  # a tuple of [L] int64, one a column
    TARGET_STARTS,  # [P] int64
    KEPT,  # [P, N] int32
    OUT,  # [P] int32
    N,
    PER_LAYER: tl.constexpr,
    SIZES: tl.constexpr,  # per column: bytes of an element
    WIDTHS: tl.constexpr,  # elements of an entry
    LANES: tl.constexpr,  # WIDTHS rounded up to powers of two
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy ROWS kept entries of a segment to its target; OUT is the number of all. Grid (P, blocks of kept entries)."""
    segment = tl.program_id(0).to(tl.int64)
    layer = segment // PER_LAYER
    row = KEPT + segment * N
    if tl.program_id(1) == 0:
        tl.store(OUT + segment, count_below(row, N, 2147483647, BLOCK))
    start = tl.load(STARTS + segment)
    target = tl.load(TARGET_STARTS + segment)
    index = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(row + index, mask=index < N, other=-1)
    for i in tl.static_range(len(WIDTHS)):
        lane = tl.arange(0, LANES[i])
        mask = (slot >= 0)[:, None] & (lane < WIDTHS[i])[None, :]
        source = integer_pointer(ADDRESSES[i], layer, SIZES[i]) + start * WIDTHS[i]
        entry = tl.load(row_pointers(source, slot.to(tl.int64), lane, WIDTHS[i]), mask=mask, other=0)
        target_base = integer_pointer(TARGETS[i], layer, SIZES[i]) + target * WIDTHS[i]
        tl.store(row_pointers(target_base, index.to(tl.int64), lane, WIDTHS[i]), entry, mask=mask)


def launch(
    segments: Segments,
    kept: Tensor,
    columns: Sequence[Column],
    target_segments: Segments,
    target_columns: Sequence[Column],
    out: Tensor,
) -> None:
    """Launch for `compact_to`, with checked arguments."""
    width = kept.shape[1]
    copy_kept[segments.count, max(1, -(-width // _ROWS))](
        tuple(column.addresses for column in columns),
        segments.starts,
        tuple(column.addresses for column in target_columns),
        target_segments.starts,
        kept,
        out,
        width,
        segments.per_layer,
        **_options(RawEntries.of(columns)),
    )


def _options(raw: RawEntries) -> dict[str, object]:
    named = {"SIZES": raw.sizes, "WIDTHS": raw.widths, "LANES": raw.lanes()}
    return {**{name: constants(numbers) for name, numbers in named.items()}, "ROWS": _ROWS, "BLOCK": COUNT_BLOCK}


def traffic(raw: RawEntries, segments: int, names: Sequence[str], width: int, kept: int) -> Traffic:
    """As `compact.traffic_to`."""
    entry = {name: kept * size for name, size in zip(names, raw.entry_bytes, strict=True)}
    return Traffic({**entry, "kept": 4 * 2 * segments * width}, {**entry, "lengths": 4 * segments})


def compile_specs() -> Iterator[CompileSpec]:
    """Launches for bfloat16 keys, values and positions."""
    for dim in (64, 128):
        columns, raw = ("*i64",) * 3, RawEntries((4, 4, 4), (dim // 2, dim // 2, 1))
        types = {"ADDRESSES": columns, "TARGETS": columns, "TARGET_STARTS": "*i64", **ARGUMENT_TYPES}
        del types["LENGTHS"]
        yield CompileSpec(
            f"compact_to D={dim}",
            copy_kept,
            types=types,
            constants={"PER_LAYER": 8, **_options(raw)},
            aligned=("STARTS", "TARGET_STARTS", "KEPT", "OUT"),
        )
