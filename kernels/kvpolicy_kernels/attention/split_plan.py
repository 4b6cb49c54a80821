"""How decode attention splits its work among programs, and the bytes that it moves. Imports no Triton."""

from collections.abc import Mapping, Sequence

import attrs

from kvpolicy_kernels.attention.kv_input import Unpacking
from kvpolicy_kernels.common.traffic import Traffic

MASS_BLOCK = 128  # slots per program of the kernel that adds attention mass
_BLOCK_BYTES = 16384  # of keys in one block: with keys, values and three stages, two programs fit a multiprocessor
_PACKED_BLOCK_BYTES = 8192  # unpacking needs more registers
_MAX_SPLITS = 64
_PROGRAMS_PER_PROCESSOR = 2  # that run at the same time
_FLOAT = 4  # bytes


@attrs.frozen
class SplitPlan:
    """Split-KV: how the entries of P segments are divided among programs (Flash-Decoding)."""

    block: int  # entries per load
    split_size: int  # entries per program, a multiple of `block`
    num_splits: int  # programs per segment
    warps: int = 4

    @classmethod
    def of(cls, row_bytes: int, longest: int, entries: int, processors: int, *, packed: bool) -> "SplitPlan":
        """Splits of equal size that keep all multiprocessors busy, however entries are spread over segments.

        Args:
            row_bytes: of the wider of a key and a value, rounded up to a power of two.
            longest: the longest segment or list of slots.
            entries: of all segments together.
            processors: multiprocessors of the GPU.
            packed: whether keys or values are packed.
        """
        block = max(16, min(64, (_PACKED_BLOCK_BYTES if packed else _BLOCK_BYTES) // row_bytes))
        wanted = max(entries // (_PROGRAMS_PER_PROCESSOR * processors), -(-longest // _MAX_SPLITS), 4 * block)
        split_size = -(-min(wanted, max(longest, 1)) // block) * block
        warps = 4 if packed or block * row_bytes >= _BLOCK_BYTES else 2
        return cls(block, split_size, max(1, -(-longest // split_size)), warps)


@attrs.frozen
class DecodeShape:
    """What decides how many bytes `decode` moves, besides the lengths."""

    plan: SplitPlan
    group: int  # G
    dim: int  # D
    value_dim: int  # Dv
    itemsize: int  # bytes of an element of queries, keys, values and outputs
    longest: int  # length of the longest segment or list
    keys: Unpacking | None = None
    values: Unpacking | None = None
    positions: bool = False
    votes: bool = False
    listed: int = 0  # bytes per number in a list of slots; 0 without lists
    logits: bool = False  # whether they are written, as an output or to compute the mass
    mass: bool = False

    @property
    def combined(self) -> bool:
        """Whether the second kernel writes the output."""
        return self.plan.num_splits > 1

    @property
    def launches(self) -> int:
        """One, or two."""
        return 2 if self.combined or self.mass else 1


def traffic(
    shape: DecodeShape, lengths: Sequence[int], packed_keys: Sequence[int] = (), packed_values: Sequence[int] = ()
) -> Traffic:
    """Bytes of one call of `decode`, when every entry that is read is visible.

    Tables of starts, lengths and addresses, and the positions of queries, are not counted.

    Args:
        shape: of the call.
        lengths: [P], entries attended to per segment: all of them, or those in its list.
        packed_keys: [P], how many of these have packed keys.
        packed_values: [P], how many have packed values.
    """
    total, none_packed = sum(lengths), [0] * len(lengths)
    programs = [-(-(shape.longest if shape.listed else length) // shape.plan.split_size) for length in lengths]
    read = {"queries": sum(programs) * shape.group * shape.dim * shape.itemsize}
    read |= _tensor_reads("keys", shape.keys, shape, shape.dim, total, sum(packed_keys or none_packed))
    read |= _tensor_reads("values", shape.values, shape, shape.value_dim, total, sum(packed_values or none_packed))
    passes = 2 if shape.mass else 1
    read["positions"] = total * _FLOAT if shape.positions else 0
    read["votes"] = total * _FLOAT * passes if shape.votes else 0
    read["slots"] = len(lengths) * shape.longest * shape.listed * passes
    written = {"out": len(lengths) * shape.group * shape.value_dim * shape.itemsize}
    written["logits"] = len(lengths) * shape.group * shape.longest * _FLOAT if shape.logits else 0
    read |= _partial_reads(shape, programs, lengths)
    written |= _partial_writes(shape, sum(programs))
    if shape.mass:
        read["logits"] = read["mass"] = written["mass"] = total * shape.group * _FLOAT
    return Traffic(_nonzero(read), _nonzero(written), shape.launches)


def _tensor_reads(
    name: str, unpacking: Unpacking | None, shape: DecodeShape, width: int, total: int, packed: int
) -> dict[str, int]:
    """Bytes of keys or values: `packed` of the `total` entries are packed."""
    counts = {name: (total - packed) * width * shape.itemsize}
    if unpacking is None:
        return counts
    whole_groups = not shape.listed and shape.plan.block % unpacking.group_size == 0
    for index, column in enumerate(unpacking.columns):
        rows = packed if column.shared and not whole_groups else packed / unpacking.group_size
        counts[f"{name}[{index}]"] = round(rows * column.width * column.dtype.itemsize)
    return counts


def _partial_writes(shape: DecodeShape, programs: int) -> dict[str, int]:
    counts = {"partial": programs * shape.group * shape.value_dim * _FLOAT if shape.combined else 0}
    return {**counts, "sums": 2 * programs * shape.group * _FLOAT if shape.launches > 1 else 0}


def _partial_reads(shape: DecodeShape, programs: Sequence[int], lengths: Sequence[int]) -> dict[str, int]:
    """Partial results that the second kernel reads: each of its programs needs all maxima and sums of a segment."""
    sums = 0
    for count, length in zip(programs, lengths, strict=True):
        blocks = -(-(shape.longest if shape.listed else length) // MASS_BLOCK) if shape.mass else 0
        sums += 2 * count * shape.group * _FLOAT * (blocks + shape.combined)
    partial = sum(programs) * shape.group * shape.value_dim * _FLOAT if shape.combined else 0
    return {"partial": partial, "sums": sums}


def _nonzero(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}
