"""State of transformers' own cache layers: copied, saved and restored by their attributes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvpolicy.cache.state_contents import Contents, Described
from kvpolicy.cache.storage.storage_bytes import bytes_of
from kvpolicy.errors import CacheError, shown

_LAYER_TYPES = (DynamicLayer, DynamicSlidingWindowLayer)
_ENTRIES = ("keys", "values")
_CHANGING = ("is_initialized", "cumulative_length", "record_past")  # attributes that differ between caches of a model
_DERIVED = ("dtype", "device")  # given by the entries


def rows_of(layer: Any) -> int:
    """Rows of a layer, 0 if it is empty."""
    return int(layer.keys.shape[0]) if layer.is_initialized and layer.get_seq_length() else 0


def bytes_of_stock(layer: object) -> int:
    """Bytes of all tensors of a layer."""
    return bytes_of(vars(layer).values())


def select_rows(layer: Any, rows: Sequence[int]) -> None:
    """Keep the given rows of a layer, in that order; does nothing if it is empty."""
    if rows_of(layer):
        layer.batch_select_indices(torch.tensor(rows, device=layer.keys.device))


def require_croppable(index: int, layer: Any, count: int) -> None:
    """Raise CacheError if a layer cannot undo `count` tokens because its sliding window has moved on."""
    length, window = layer.get_seq_length(), getattr(layer, "sliding_window", None)
    beyond = window is not None and length >= window and not getattr(layer, "record_past", False)
    if count and rows_of(layer) and (count > length or beyond):
        raise CacheError(
            f"layer {index}: cannot undo {count} tokens, its window has moved on; "
            "call activate_past_recording() before tokens that may be undone"
        )


def describe(index: int, layer: object) -> Described:
    """Tensors and numbers of layer `index`. Raises CacheError for other attributes and for unknown types of layers."""
    if type(layer) not in _LAYER_TYPES:
        raise CacheError(f"layer {index}: a {type(layer).__name__} of the model's library cannot be copied or saved")
    for name, value in vars(layer).items():
        if isinstance(value, (Tensor, bool, int, float)):
            yield name, value
        elif value is not None and name not in _DERIVED:
            raise CacheError(f"layer {index}: its attribute {shown(name)} cannot be copied or saved: {shown(value)}")


def restore(layer: Any, contents: Contents, rows: int, seen: int, dtype: torch.dtype) -> None:
    """Restore the state of a new layer: `rows` rows of `seen` tokens, with entries in `dtype` or a narrower one.

    Attributes that are equal for all caches of a model must have the same values. Raises the error of `contents`.
    """
    initialised = contents.has("keys")
    if initialised:
        keys = contents.tensor("keys", None, (rows, None, None, None))
        values = contents.tensor("values", keys.dtype, (rows, keys.shape[1], keys.shape[2], None))
        if torch.promote_types(keys.dtype, dtype) != dtype:
            raise contents.wrong("keys", f"must be {dtype}: {keys.dtype}")
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys.clone(), values.clone()
    for name, value in vars(layer).items():
        if name in _CHANGING:
            number = contents.flag(name) if isinstance(value, bool) else contents.integer(name)
            setattr(layer, name, number)
        elif isinstance(value, Tensor) and name not in _ENTRIES:
            saved = contents.tensor(name, value.dtype, value.shape)
            _require(contents, name, torch.equal(saved.cpu(), value.cpu()), value)
        elif isinstance(value, int):
            _require(contents, name, contents.integer(name) == value, value)
    if layer.is_initialized != initialised:
        raise contents.wrong("is_initialized", f"must be {shown(initialised)}")
    if initialised:
        _check_length(layer, contents, seen)


def copied(index: int, layer: object, fresh: Any, rows: Sequence[int], dtype: torch.dtype) -> None:
    """Copy rows of a layer to a new layer, without sharing storage."""
    described = dict(describe(index, layer))
    tensors: Mapping[str, Tensor] = {name: value for name, value in described.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in described.items() if name not in tensors}
    device = next((tensors[name].device for name in _ENTRIES if name in tensors), torch.device("cpu"))
    contents = Contents(tensors, numbers, device, lambda message: CacheError(f"layer {index}: {message}"))
    source: Any = layer
    restore(fresh, contents, rows_of(source), source.get_seq_length(), dtype)
    if list(rows) != list(range(rows_of(source))):
        select_rows(fresh, rows)


def _check_length(layer: Any, contents: Contents, seen: int) -> None:
    """Raise an error unless the layer has the number of entries that a forward expects after `seen` tokens."""
    window = getattr(layer, "sliding_window", None)
    expected = seen if window is None or window < 2 else min(seen, window - 1)
    if layer.get_seq_length() != seen or layer.keys.shape[2] != expected:
        raise contents.wrong("keys", f"must hold {expected} of {seen} tokens: {layer.keys.shape[2]}")


def _require(contents: Contents, name: str, same: object, value: object) -> None:
    if not same:
        raise contents.wrong(name, f"must be that of this model: {value}")
