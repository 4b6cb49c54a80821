"""How the entries of a layer get into static storage, and out of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kvpolicy.cache.storage.layout import Layout, PerSegment
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.cache.storage.slot_store import SlotStore
from kvpolicy.errors import CacheError
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer
from kvpolicy.integrations.transformers.decode_graph.static_layer import StaticLayer
from kvpolicy.plan.plan import POSITIONS


def take_over(static: StaticLayer, layer: PolicyLayer, take_back_storage: Callable[[], None]) -> list[int]:
    """Make the static storage that of the layer's stores, with all that they hold: entries per KV head, [B]."""
    storage = layer.hand_over(take_back_storage)
    lengths = storage.slots.lengths
    for store, tensors in _stores(static, storage):
        for name, tensor in tensors.items():
            if not _is_in(store, name, tensor):
                _fill(tensor, store, name)
        store.adopt(_flat(tensors), _layout(static), lengths)
    alike = [heads[0] for heads in lengths]
    static.slots.lengths.copy_(torch.tensor(alike))
    static.scaling = layer.scaling
    window = layer.window.last(range(len(lengths)))
    if static.slots.ring is not None and window[0] is not None:
        static.slots.ring.fill(*window)
    layer.stats.sample(layer.seq_len, storage.slots.average, storage.nbytes, layer.window.nbytes)
    return alike


def sync_back(static: StaticLayer, layer: PolicyLayer, num_tokens: Sequence[int], lengths: Sequence[int]) -> None:
    """Tell the layer what steps have done: rows of `num_tokens` tokens, `lengths` entries per KV head.

    Raises CacheError when the device counted something else: a plugin has kept more or fewer entries than it should.
    """
    found = static.slots.lengths.tolist()
    if found != list(lengths):
        raise CacheError(f"layer {layer.stats.layer}: rows hold {found} entries instead of {list(lengths)}")
    ring = static.slots.ring
    layer.resume_after_static(num_tokens, None if ring is None else ring.ordered())
    table = _table(static, lengths)
    for store, tensors in _stores(static, layer.segmented):
        store.adopt(_flat(tensors), _layout(static), table)


def give_back(static: StaticLayer, layer: PolicyLayer) -> None:
    """Give the layer storage of its own, where its stores are still the static one."""
    for store, tensors in _stores(static, layer.segmented):
        if any(_is_in(store, name, tensor) for name, tensor in tensors.items()):
            store.adopt({name: tensor.clone() for name, tensor in store.tensors.items()}, store.layout, store.lengths)


def _stores(static: StaticLayer, storage: SegmentedStorage) -> Iterator[tuple[SlotStore, Mapping[str, Tensor]]]:
    """Each store of a layer, and the static tensors of its columns, [B, K, C, ...]."""
    yield storage.keys.residual, {storage.keys.name: static.slots.keys}
    yield storage.values.residual, {storage.values.name: static.slots.values}
    yield storage.slots, static.slots.columns


def _is_in(store: SlotStore, name: str, tensor: Tensor) -> bool:
    return store.tensors[name].data_ptr() == tensor.data_ptr()


def _fill(tensor: Tensor, store: SlotStore, name: str) -> None:
    entries = store.padded(name, range(store.layout.rows))
    count = entries.shape[2]
    tensor[:, :, :count] = entries
    tensor[:, :, count:] = -1 if name == POSITIONS else 0  # what another cache has left could be NaN


def _flat(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.flatten(0, 2) for name, tensor in tensors.items()}


def _layout(static: StaticLayer) -> Layout:
    rows, heads, capacity = static.slots.keys.shape[:3]
    return Layout.even(rows, heads, capacity)


def _table(static: StaticLayer, lengths: Sequence[int]) -> PerSegment:
    heads = static.slots.keys.shape[1]
    return tuple((length,) * heads for length in lengths)
