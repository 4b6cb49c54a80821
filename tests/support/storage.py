"""What a layer holds, read segment by segment, whatever storage it is in."""

from kvpolicy.cache.storage.segment_index import RowSegments
from kvpolicy.stages import Column

STATES = ("keys", "values")


def segment(storage, name, row, head):
    """[length, ...]: a column, or the keys or values as attention sees them."""
    return _read(storage, name, RowSegments([row]))[0, head, : storage.lengths[row][head]]


def segments_of(storage, name, row):
    """The same of every head of a row."""
    read = _read(storage, name, RowSegments([row]))[0]
    return [slots[:length] for slots, length in zip(read, storage.lengths[row], strict=True)]


def padded(storage, name):
    """[B, K, T, ...] of all rows."""
    return _read(storage, name, storage.everything)


def _read(storage, name, at):
    if name not in STATES:
        return storage.column(name, at)
    positions = storage.column("positions", at)
    return getattr(storage, name).read(at, 0, positions.shape[2], positions)


def tensors(storage):
    """Every tensor of a segmented storage, by store and name."""
    named = enumerate(storage.stores)
    return {(place, name): tensor for place, store in named for name, tensor in store.tensors.items()}


def bytes_per_slot(plan):
    """Bytes of an entry of one KV head that is held as it is."""
    plain = Column((plan.geometry.head_dim,), plan.dtype).bytes_per_slot
    return 2 * plain + sum(column.bytes_per_slot for column in plan.columns.values())
