"""What a layer holds, read segment by segment, whatever store it is in."""

from kvpolicy.cache.storage.segment_index import RowSegments
from kvpolicy.stages import Column

HALVES = ("keys", "values")


def segment(held, name, row, head):
    """[length, ...]: a column, or the keys or values as attention sees them."""
    if name in HALVES:
        return _read(held, name, RowSegments([row]))[0, head, : held.slots.lengths[row][head]]
    return held.slots.segment(name, row, head)


def segments_of(held, name, row):
    """The same of every head of a row."""
    lengths = held.slots.lengths[row]
    if name not in HALVES:
        return [held.slots.segment(name, row, head) for head in range(len(lengths))]
    read = _read(held, name, RowSegments([row]))[0]
    return [one[:length] for one, length in zip(read, lengths, strict=True)]


def padded(held, name):
    """[B, K, T, ...] of all rows."""
    return _read(held, name, RowSegments(range(held.slots.layout.rows)))


def _read(held, name, at):
    positions = at.of(held.slots, "positions")
    if name in HALVES:
        return getattr(held, name).read(at, 0, positions.shape[2], positions)
    return at.of(held.slots, name)


def stores(held):
    """Every store of a layer."""
    halves = [store for name in HALVES for store in (getattr(held, name).packed, getattr(held, name).residual)]
    return [held.slots, *halves, held.pages.store]


def tensors(held):
    """Every tensor that a layer holds, by store and name."""
    return {(place, name): one for place, store in enumerate(stores(held)) for name, one in store.tensors.items()}


def bytes_per_slot(plan):
    """Bytes of an entry of one KV head that is held as it is."""
    plain = Column((plan.geometry.head_dim,), plan.dtype).bytes_per_slot
    return 2 * plain + sum(column.bytes_per_slot for column in plan.columns.values())
