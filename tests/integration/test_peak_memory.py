"""No full-precision copy of a packed cache exists while it is attended to: live tensors are counted."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvpolicy.attention import blockwise
from tests.property.test_packed_layers import HEADS, entries, plan_of
from tests.support.driving import feed, new_layer

LENGTH, DIM = 8_000, 64


class Peak(TorchDispatchMode):
    """Bytes of the storages made since the beginning that are alive at one time, at most."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self._note(one, given)
        return result

    def _note(self, tensor, given):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive or key in given:
            return
        self.alive.add(key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key, nbytes):
        self.alive.discard(key)
        self.now -= nbytes


@pytest.mark.parametrize("store", ["kivi", "tada", "rotation", "turboquant", "fp8", "latent"])
def test_a_decode_step_needs_a_fraction_of_what_the_cache_would_take(store, monkeypatch):
    monkeypatch.setattr(blockwise, "_NUMBERS", {"cpu": LENGTH * HEADS * DIM // 16})  # a few megabytes else
    plan = plan_of(store, dim=DIM)
    layer, generator = new_layer(plan), torch.Generator().manual_seed(0)
    feed(layer, *entries(generator, 1, LENGTH, DIM))
    feed(layer, *entries(generator, 1, 1, DIM))
    token = entries(generator, 1, 1, DIM)
    with Peak() as peak:
        feed(layer, *token)
    full = 2 * LENGTH * HEADS * DIM * 4
    assert 0 < peak.most < full / 4
