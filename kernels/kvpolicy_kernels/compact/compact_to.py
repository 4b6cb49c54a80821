"""Compaction into other storages, from a dense layout to a ragged one for example; the order of slots is kept."""

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.common.compile_spec import Build
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.compact.raw_entries import COUNTED, MOVING_TYPES, Bits, constants, count_below, entries, storage

_ROWS = 32  # entries that a program moves together


@triton.jit(do_not_specialize=["N"])
def copy_kept(
    ADDRESSES,  # a tuple of [L] int64, one a column
    STARTS,  # [P] int64
    TARGETS,  # as ADDRESSES
    TARGET_STARTS,  # [P] int64
    KEPT,  # [P, N] int32
    OUT,  # [P] int32
    N,
    PER_LAYER: tl.constexpr,
    SIZES: tl.constexpr,  # of a column: bytes of an element
    WIDTHS: tl.constexpr,  # elements of an entry
    LANES: tl.constexpr,  # the power of two that holds them
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy the kept entries of a segment to the front of its target; OUT = how many they are."""
    segment = tl.program_id(0).to(tl.int64)
    layer = segment // PER_LAYER
    row = KEPT + segment * N
    if tl.program_id(1) == 0:
        tl.store(OUT + segment, count_below(row, N, 2147483647, BLOCK))
    start = tl.load(STARTS + segment)
    target = tl.load(TARGET_STARTS + segment)
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(row + place, mask=place < N, other=-1)
    for i in tl.static_range(len(WIDTHS)):
        lane = tl.arange(0, LANES[i])
        mask = (slot >= 0)[:, None] & (lane < WIDTHS[i])[None, :]
        source = storage(ADDRESSES[i], layer, SIZES[i]) + start * WIDTHS[i]
        found = tl.load(entries(source, slot, lane, WIDTHS[i]), mask=mask, other=0)
        onto = storage(TARGETS[i], layer, SIZES[i]) + target * WIDTHS[i]
        tl.store(entries(onto, place, lane, WIDTHS[i]), found, mask=mask)


def launch(
    segments: Segments,
    kept: Tensor,
    columns: Sequence[Column],
    target_segments: Segments,
    target_columns: Sequence[Column],
    out: Tensor,
) -> None:
    """`compact_to` with checked arguments."""
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
        **_options(Bits.of(columns)),
    )


def _options(bits: Bits) -> dict[str, object]:
    named = {"SIZES": bits.sizes, "WIDTHS": bits.widths, "LANES": bits.lanes()}
    return {**{name: constants(numbers) for name, numbers in named.items()}, "ROWS": _ROWS, "BLOCK": COUNTED}


def traffic(bits: Bits, segments: int, names: Sequence[str], width: int, kept: int) -> Traffic:
    """As `compact.traffic_to`."""
    entry = {name: kept * size for name, size in zip(names, bits.entry_bytes, strict=True)}
    return Traffic({**entry, "kept": 4 * 2 * segments * width}, {**entry, "lengths": 4 * segments})


def builds() -> Iterator[Build]:
    """Launches as for bfloat16 keys and values with positions."""
    for dim in (64, 128):
        columns, bits = ("*i64",) * 3, Bits((4, 4, 4), (dim // 2, dim // 2, 1))
        types = {"ADDRESSES": columns, "TARGETS": columns, "TARGET_STARTS": "*i64", **MOVING_TYPES}
        del types["LENGTHS"]
        yield Build(
            f"compact_to D={dim}",
            copy_kept,
            types=types,
            constants={"PER_LAYER": 8, **_options(bits)},
            aligned=("STARTS", "TARGET_STARTS", "KEPT", "OUT"),
        )
