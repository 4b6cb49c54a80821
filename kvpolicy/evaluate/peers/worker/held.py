"""Bytes that a cache really holds: those of the storages of its tensors, each counted once."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch


def held_bytes(cache: Any) -> int:
    """Bytes of all storages that the layers of a cache keep alive, whatever part of them its tensors show."""
    storages = {}
    for tensor in _tensors([vars(layer) for layer in cache.layers], set()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr(), tensor.device] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Plain tensors in a value, those within packed ones included."""
    if id(value) in seen:
        return
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):  # a packed tensor: its parts are plain, or packed themselves
            names, _ = value.__tensor_flatten__()
            yield from _each((getattr(value, name) for name in names), seen)
        else:
            yield value
    elif isinstance(value, Mapping):
        yield from _each(value.values(), seen | {id(value)})
    elif isinstance(value, (list, tuple)):
        yield from _each(value, seen | {id(value)})


def _each(values: Iterable[Any], seen: set[int]) -> Iterator[torch.Tensor]:
    for value in values:
        yield from _tensors(value, seen)
