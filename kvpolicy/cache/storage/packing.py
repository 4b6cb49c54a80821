"""Packs what is due in several layers, which the host waits for once."""

from collections.abc import Sequence
from itertools import islice

import torch

from kvpolicy.cache.storage.layer_storage import LayerStorage


def pack_layers(storages: Sequence[LayerStorage], limits: Sequence[int]) -> list[bool]:
    """Pack what is due in storages of the same rows and heads; says of each whether anything was.

    `limits` as in `LayerStorage.pack`. Where something is due, the host reads once how much of it is finite.
    """
    due = [storage.due_packing() for storage in storages]
    counts = [one.sound for of_storage in due for one in of_storage]
    told = iter(torch.stack(counts).tolist() if counts else ())
    return [
        storage.pack(own, list(islice(told, len(own))), limit)
        for storage, own, limit in zip(storages, due, limits, strict=True)
    ]
