"""Bytes of tensor storages, each counted once."""

from collections.abc import Iterable

from torch import Tensor


def bytes_of(tensors: Iterable[object], counted: set[int] | None = None) -> int:
    """Bytes of the storages of the tensors among `tensors` that are not in `counted` (pointers), which is updated."""
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    counted = set() if counted is None else counted
    new = sizes.keys() - counted
    counted |= new
    return sum(sizes[pointer] for pointer in new)
