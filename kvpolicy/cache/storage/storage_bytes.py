"""Bytes of storage, counted once however many tensors share it."""

from collections.abc import Iterable

from torch import Tensor


def bytes_of(tensors: Iterable[object], counted: set[int] | None = None) -> int:
    """Bytes of the storages of the tensors among these objects, less those `counted` already, which grow by them."""
    storages = [one.untyped_storage() for one in tensors if isinstance(one, Tensor)]
    found = {storage.data_ptr(): storage.nbytes() for storage in storages}
    counted = set() if counted is None else counted
    fresh = found.keys() - counted
    counted |= fresh
    return sum(found[place] for place in fresh)
