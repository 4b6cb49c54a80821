"""Bytes of storage, counted once however many tensors share it."""

from collections.abc import Iterable

from torch import Tensor


def bytes_of(tensors: Iterable[object]) -> int:
    """Bytes of the storages of the tensors among these objects."""
    storages = (one.untyped_storage() for one in tensors if isinstance(one, Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
