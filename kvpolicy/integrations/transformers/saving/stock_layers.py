"""The state of the layers that are the model library's own: copied, written and read by walking their attributes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvpolicy.cache.state_contents import Contents, Described
from kvpolicy.cache.storage.storage_bytes import bytes_of
from kvpolicy.errors import CacheError, shown

_KINDS = (DynamicLayer, DynamicSlidingWindowLayer)
_ENTRIES = ("keys", "values")
_CHANGING = ("is_initialized", "cumulative_length", "record_past")  # numbers that are not the same for every cache
_DERIVED = ("dtype", "device")  # those of the entries


def rows_of(layer: Any) -> int:
    """Rows that a layer holds, 0 when it is empty."""
    return int(layer.keys.shape[0]) if layer.is_initialized and layer.get_seq_length() else 0


def bytes_of_stock(layer: object) -> int:
    """Bytes of all tensors of a layer."""
    return bytes_of(vars(layer).values())


def select_rows(layer: Any, rows: Sequence[int]) -> None:
    """Let a layer hold the rows named, in that order; nothing where it is empty."""
    if rows_of(layer):
        layer.batch_select_indices(torch.tensor(rows, device=layer.keys.device))


def require_croppable(index: int, layer: Any, count: int) -> None:
    """Raise CacheError when a layer cannot undo `count` tokens: its window has moved on."""
    length, window = layer.get_seq_length(), getattr(layer, "sliding_window", None)
    beyond = window is not None and length >= window and not getattr(layer, "record_past", False)
    if count and rows_of(layer) and (count > length or beyond):
        raise CacheError(
            f"layer {index}: cannot undo {count} tokens, its window has moved on; "
            "call activate_past_recording() before tokens that may be undone"
        )


def describe(index: int, layer: object) -> Described:
    """Tensors and numbers of layer `index`. Raises CacheError for an attribute, or a kind of layer, that is neither."""
    if type(layer) not in _KINDS:
        raise CacheError(f"layer {index}: a {type(layer).__name__} of the model's library cannot be copied or saved")
    for name, value in vars(layer).items():
        if isinstance(value, (Tensor, bool, int, float)):
            yield name, value
        elif value is not None and name not in _DERIVED:
            raise CacheError(f"layer {index}: its attribute {shown(name)} cannot be copied or saved: {shown(value)}")


def restore(layer: Any, contents: Contents, rows: int, seen: int, dtype: torch.dtype) -> None:
    """Let a new layer go on with the state of `rows` rows of `seen` tokens, with entries in `dtype` or a narrower one.

    What is the same for every cache of a model must be the same here. Raises the error of the contents.
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
            found = contents.tensor(name, value.dtype, value.shape)
            _require(contents, name, torch.equal(found.cpu(), value.cpu()), value)
        elif isinstance(value, int):
            _require(contents, name, contents.integer(name) == value, value)
    if layer.is_initialized != initialised:
        raise contents.wrong("is_initialized", f"must be {shown(initialised)}")
    if initialised:
        _check_length(layer, contents, seen)


def copied(index: int, layer: object, fresh: Any, rows: Sequence[int], dtype: torch.dtype) -> None:
    """Let a new layer go on with rows of a layer in use; they share no storage."""
    described = dict(describe(index, layer))
    tensors: Mapping[str, Tensor] = {name: one for name, one in described.items() if isinstance(one, Tensor)}
    numbers = {name: one for name, one in described.items() if name not in tensors}
    device = next((tensors[name].device for name in _ENTRIES if name in tensors), torch.device("cpu"))
    contents = Contents(tensors, numbers, device, lambda message: CacheError(f"layer {index}: {message}"))
    held: Any = layer
    restore(fresh, contents, rows_of(held), held.get_seq_length(), dtype)
    if list(rows) != list(range(rows_of(held))):
        select_rows(fresh, rows)


def _check_length(layer: Any, contents: Contents, seen: int) -> None:
    """Raise an error unless as many entries are held as a forward expects of `seen` tokens."""
    window = getattr(layer, "sliding_window", None)
    expected = seen if window is None or window < 2 else min(seen, window - 1)
    if layer.get_seq_length() != seen or layer.keys.shape[2] != expected:
        raise contents.wrong("keys", f"must hold {expected} of {seen} tokens: {layer.keys.shape[2]}")


def _require(contents: Contents, name: str, same: object, value: object) -> None:
    if not same:
        raise contents.wrong(name, f"must be that of this model: {value}")
