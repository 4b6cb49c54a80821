"""Compaction: the kept entries of all segments move together, every column in the same launch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import require
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.compact import compact_holes, compact_ordered
from kvpolicy_kernels.compact import compact_to as _copies
from kvpolicy_kernels.compact.raw_entries import Bits, check_moves

_POSITIONS = "positions"


def compact(
    segments: Segments,
    kept: Tensor,
    columns: Sequence[Column],
    *,
    ordered: bool,
    positions: Column | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Move the kept entries of every segment to its first slots, in place, bit for bit.

    Args:
        segments: P segments of at most T entries.
        kept: [P, N] int32, ascending slots, all below the segment's length, and -1 behind them.
        columns: what an entry is made of besides its position; any dtype and width.
        ordered: whether kept entries stay in order. Else those behind the new length fill the holes before it, in
            ascending order: at most min(N, T - N) entries move if all N are kept, and no others are touched.
        positions: [slots] int32; moved as well, and -1 is written to the slots that become empty. The empty slots of
            other columns hold what they held.
        out: [P] int32, may not be `segments.lengths`.

    Returns:
        The new lengths, [P] int32.

    Raises:
        UnsupportedInputError: nothing was moved.
    """
    moving = [column for column in columns if column is not positions]
    check_moves(segments, kept, moving if positions is None else [*moving, positions])
    out = _lengths(segments, kept, out)
    if positions is not None:
        right = positions.dtype == torch.int32 and positions.width == 1
        require(right, "positions must be one int32 an entry")
        moving.append(positions)
    launch = compact_ordered.launch if ordered else compact_holes.launch
    launch(segments, kept, moving, clears=positions is not None, out=out)
    return out


def compact_to(
    segments: Segments,
    kept: Tensor,
    columns: Sequence[Column],
    target_segments: Segments,
    target_columns: Sequence[Column],
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Copy the kept entries of every segment to the first slots of another one, bit for bit and in order.

    Args:
        segments: P segments.
        kept: [P, N] int32, slots, and -1 behind them.
        columns: what an entry is made of, positions included.
        target_segments: P segments with room for what is kept. Their lengths are not looked at.
        target_columns: the same columns in other storages. Slots behind the kept entries stay as they are.
        out: [P] int32, may not be `segments.lengths`.

    Returns:
        The new lengths, [P] int32.

    Raises:
        UnsupportedInputError: nothing was copied.
    """
    check_moves(segments, kept, columns)
    check_moves(target_segments, kept, target_columns)
    shapes = [[(column.dtype, column.width) for column in side] for side in (columns, target_columns)]
    require(shapes[0] == shapes[1], "columns and their targets differ in dtype or width")
    require(segments.per_layer == target_segments.per_layer, "layers differ in rows or KV heads")
    require(not (_memory(columns) & _memory(target_columns)), "a target shares memory with a source")
    out = _lengths(segments, kept, out)
    _copies.launch(segments, kept, columns, target_segments, target_columns, out)
    return out


def traffic(
    segments: Segments,
    columns: Mapping[str, Column],
    width: int,
    *,
    ordered: bool,
    held: int,
    kept: int,
    moved: int,
) -> Traffic:
    """Bytes of `compact`, by name of column; a column called `positions` is that of the positions.

    Args:
        segments: P segments; lengths are not looked at.
        columns: by name.
        width: N, slots per segment that `kept` has room for.
        ordered: as in `compact`.
        held: entries of all segments before.
        kept: entries of all segments afterwards.
        moved: how many of them change their slot; at most `kept`, and at most `held` - `kept` unless `ordered`.
    """
    named = dict(sorted(columns.items(), key=lambda item: item[0] == _POSITIONS))
    bits = Bits.of(list(named.values()))
    if ordered:
        part = compact_ordered.traffic(bits, segments.count, list(named), width, kept, moved)
    else:
        clears = _POSITIONS in named
        part = compact_holes.traffic(bits, segments, list(named), width, moved, clears=clears)
    cleared = {_POSITIONS: 4 * (held - kept)} if _POSITIONS in named else {}
    return Traffic.total([part, Traffic(written=cleared, launches=0)])


def traffic_to(segments: Segments, columns: Mapping[str, Column], width: int, *, kept: int) -> Traffic:
    """Bytes of `compact_to`, by name of column; arguments as for `traffic`."""
    return _copies.traffic(Bits.of(list(columns.values())), segments.count, list(columns), width, kept)


def _lengths(segments: Segments, kept: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(segments.count, dtype=torch.int32, device=kept.device)
    right = out.dtype == torch.int32 and out.shape == (segments.count,) and out.is_contiguous()
    require(right and out.device == kept.device, f"lengths must be [{segments.count}] int32 beside the kept slots")
    require(out.data_ptr() != segments.lengths.data_ptr(), "new lengths must not overwrite the old ones")
    return out


def _memory(columns: Sequence[Column]) -> set[int]:
    return {one.untyped_storage().data_ptr() for column in columns for one in column.storages if one.numel()}
