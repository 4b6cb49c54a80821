"""Compaction: moves the kept entries of all segments, all columns in one launch.

Reference: tests/kernels/compact/compacting.py.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import require
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.compact import compact_holes, compact_ordered
from kvpolicy_kernels.compact import compact_to as copy_kernel
from kvpolicy_kernels.compact.raw_entries import RawEntries, check_moves

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
    """Move the kept entries of every segment to its first slots, in place and bit for bit.

    Args:
        segments: P segments of at most T entries.
        kept: [P, N] int32, ascending slots below the segment's length, padded with -1.
        columns: all columns but positions; any dtype and width.
        ordered: whether kept entries stay in order. If not, kept entries beyond the new length move to the dropped
            slots before it, in ascending order; the others stay. At most min(N, T - N) entries move.
        positions: int32; moved as well, and slots that become empty get -1. In other columns they keep their contents.
        out: [P] int32 contiguous, written in place; must not be `segments.lengths`.

    Returns:
        The new lengths, [P] int32.

    Raises:
        UnsupportedInputError: the kernels do not support these inputs; nothing was moved.
    """
    moved_columns = [column for column in columns if column is not positions]
    check_moves(segments, kept, moved_columns if positions is None else [*moved_columns, positions])
    out = _new_lengths(segments, kept, out)
    if positions is not None:
        valid = positions.dtype == torch.int32 and positions.width == 1
        require(valid, "positions must be one int32 an entry")
        moved_columns.append(positions)
    launch = compact_ordered.launch if ordered else compact_holes.launch
    launch(segments, kept, moved_columns, clears=positions is not None, out=out)
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
    """Copy the kept entries of every segment to the first slots of a target segment, in order and bit for bit.

    Args:
        segments: P segments.
        kept: [P, N] int32, slots, padded with -1.
        columns: all columns, including positions.
        target_segments: P segments with room for the kept entries; their lengths are not read.
        target_columns: the same columns in other storages. Slots after the kept entries are not written.
        out: [P] int32 contiguous, written in place; must not be `segments.lengths`.

    Returns:
        The new lengths, [P] int32.

    Raises:
        UnsupportedInputError: the kernels do not support these inputs; nothing was copied.
    """
    check_moves(segments, kept, columns)
    check_moves(target_segments, kept, target_columns)
    shapes = [[(column.dtype, column.width) for column in side] for side in (columns, target_columns)]
    require(shapes[0] == shapes[1], "columns and their targets differ in dtype or width")
    require(segments.per_layer == target_segments.per_layer, "layers differ in rows or KV heads")
    require(
        not (_storage_addresses(columns) & _storage_addresses(target_columns)), "a target shares memory with a source"
    )
    out = _new_lengths(segments, kept, out)
    copy_kernel.launch(segments, kept, columns, target_segments, target_columns, out)
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
    """Bytes that `compact` moves, by column name; the column `positions` is passed as its `positions`.

    Args:
        segments: P segments; their lengths are not read.
        columns: by name.
        width: N, the second dimension of `kept`.
        ordered: as in `compact`.
        held: entries of all segments before compaction.
        kept: entries of all segments after it.
        moved: kept entries whose slot changes: at most `kept`, and at most `held` - `kept` unless `ordered`.
    """
    named = dict(sorted(columns.items(), key=lambda item: item[0] == _POSITIONS))
    raw = RawEntries.of(list(named.values()))
    if ordered:
        part = compact_ordered.traffic(raw, segments.count, list(named), width, kept, moved)
    else:
        clears = _POSITIONS in named
        part = compact_holes.traffic(raw, segments, list(named), width, moved, clears=clears)
    cleared = {_POSITIONS: 4 * (held - kept)} if _POSITIONS in named else {}
    return Traffic.total([part, Traffic(written=cleared, launches=0)])


def traffic_to(segments: Segments, columns: Mapping[str, Column], width: int, *, kept: int) -> Traffic:
    """Bytes that `compact_to` moves, by column name; arguments as for `traffic`."""
    return copy_kernel.traffic(RawEntries.of(list(columns.values())), segments.count, list(columns), width, kept)


def _new_lengths(segments: Segments, kept: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(segments.count, dtype=torch.int32, device=kept.device)
    valid = out.dtype == torch.int32 and out.shape == (segments.count,) and out.is_contiguous()
    require(valid and out.device == kept.device, f"lengths must be [{segments.count}] int32 beside the kept slots")
    require(out.data_ptr() != segments.lengths.data_ptr(), "new lengths must not overwrite the old ones")
    return out


def _storage_addresses(columns: Sequence[Column]) -> set[int]:
    storages = [storage for column in columns for storage in column.storages if storage.numel()]
    return {storage.untyped_storage().data_ptr() for storage in storages}
