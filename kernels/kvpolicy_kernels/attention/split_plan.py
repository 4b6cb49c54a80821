"""How decode attention divides its work among programs, and the bytes that these move. Imports no Triton."""

from collections.abc import Mapping, Sequence

import attrs

from kvpolicy_kernels.attention.kv_input import Unpacking
from kvpolicy_kernels.common.traffic import Traffic

MASS_BLOCK = 128  # slots whose attention mass one program finishes
_TILE_BYTES = 16384  # of keys in one block: with two halves and three stages, two programs fit into a multiprocessor
_PACKED_BYTES = 8192  # unpacking needs more registers
_MOST_SPLITS = 64
_PROGRAMS_EACH = 2  # that a multiprocessor runs at one time
_FLOAT = 4  # bytes


@attrs.frozen
class Division:
    """How the entries of P segments are divided among programs."""

    block: int  # entries that are loaded at one time
    item: int  # entries per program, whole blocks
    splits: int  # programs per segment
    warps: int = 4

    @classmethod
    def of(cls, row_bytes: int, longest: int, entries: int, processors: int, *, packed: bool) -> "Division":
        """So that all multiprocessors have work: items of equal size, however entries are spread over segments.

        `row_bytes` are those of the wider of a key and a value, rounded up to a power of two, `longest` is the longest
        segment or list, and `entries` are those of all segments.
        """
        block = max(16, min(64, (_PACKED_BYTES if packed else _TILE_BYTES) // row_bytes))
        wanted = max(entries // (_PROGRAMS_EACH * processors), -(-longest // _MOST_SPLITS), 4 * block)
        item = -(-min(wanted, max(longest, 1)) // block) * block
        warps = 4 if packed or block * row_bytes >= _TILE_BYTES else 2
        return cls(block, item, max(1, -(-longest // item)), warps)


@attrs.frozen
class DecodeShape:
    """What decides how many bytes a launch addresses, beside the lengths."""

    division: Division
    group: int  # G
    dim: int  # D
    value_dim: int  # Dv
    itemsize: int  # of queries, keys, values and outputs
    longest: int  # of segments or lists
    keys: Unpacking | None = None
    values: Unpacking | None = None
    positions: bool = False
    votes: bool = False
    listed: int = 0  # bytes of one number in a list of slots; 0 without
    logits: bool = False  # whether they are written, for themselves or for the mass
    mass: bool = False

    @property
    def combined(self) -> bool:
        """Whether outputs come from the second kernel."""
        return self.division.splits > 1

    @property
    def launches(self) -> int:
        """One, or two."""
        return 2 if self.combined or self.mass else 1


def traffic(
    shape: DecodeShape, lengths: Sequence[int], packed_keys: Sequence[int] = (), packed_values: Sequence[int] = ()
) -> Traffic:
    """Bytes of one call of `decode`, when every entry that is read is visible.

    `lengths` [P] are the entries attended to in each segment: all that it holds, or those in its list;
    `packed_keys` and `packed_values` [P] are how many of these are packed. Tables of starts, lengths and addresses,
    and the positions of queries, are left out.
    """
    total, nothing = sum(lengths), [0] * len(lengths)
    programs = [-(-(shape.longest if shape.listed else length) // shape.division.item) for length in lengths]
    read = {"queries": sum(programs) * shape.group * shape.dim * shape.itemsize}
    read |= _half("keys", shape.keys, shape, shape.dim, total, sum(packed_keys or nothing))
    read |= _half("values", shape.values, shape, shape.value_dim, total, sum(packed_values or nothing))
    passes = 2 if shape.mass else 1
    read["positions"] = total * _FLOAT if shape.positions else 0
    read["votes"] = total * _FLOAT * passes if shape.votes else 0
    read["slots"] = len(lengths) * shape.longest * shape.listed * passes
    written = {"out": len(lengths) * shape.group * shape.value_dim * shape.itemsize}
    written["logits"] = len(lengths) * shape.group * shape.longest * _FLOAT if shape.logits else 0
    read |= _partial_read(shape, programs, lengths)
    written |= _partial_written(shape, sum(programs))
    if shape.mass:
        read["logits"] = read["mass"] = written["mass"] = total * shape.group * _FLOAT
    return Traffic(_present(read), _present(written), shape.launches)


def _half(name: str, how: Unpacking | None, shape: DecodeShape, width: int, total: int, packed: int) -> dict[str, int]:
    counts = {name: (total - packed) * width * shape.itemsize}
    if how is None:
        return counts
    runs = not shape.listed and shape.division.block % how.unit == 0
    for place, column in enumerate(how.columns):
        row = column.width * column.dtype.itemsize
        rows = packed if column.shared and not runs else packed / how.unit
        counts[f"{name}[{place}]"] = round(rows * row)
    return counts


def _partial_written(shape: DecodeShape, programs: int) -> dict[str, int]:
    counts = {"partial": programs * shape.group * shape.value_dim * _FLOAT if shape.combined else 0}
    return {**counts, "sums": 2 * programs * shape.group * _FLOAT if shape.launches > 1 else 0}


def _partial_read(shape: DecodeShape, programs: Sequence[int], lengths: Sequence[int]) -> dict[str, int]:
    """What the second kernel reads of it: every program of a segment needs all its peaks and sums."""
    sums = 0
    for count, length in zip(programs, lengths, strict=True):
        blocks = -(-(shape.longest if shape.listed else length) // MASS_BLOCK) if shape.mass else 0
        sums += 2 * count * shape.group * _FLOAT * (blocks + shape.combined)
    partial = sum(programs) * shape.group * shape.value_dim * _FLOAT if shape.combined else 0
    return {"partial": partial, "sums": sums}


def _present(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}
