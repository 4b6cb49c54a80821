"""Memory that runs out at any allocation leaves a cache that is whole, and that says that it cannot go on."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvpolicy.errors import CacheError
from tests.support.driving import feed, new_layer, random_entries, worth_plan

_WRITES = ("copy_", "fill_", "index_put_", "add_", "zero_")


class RunsOut(TorchDispatchMode):
    """Raises at the n-th operation that allocates; counts them."""

    def __init__(self, at=-1):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not function.is_view and name not in _WRITES:
            if self.count == self.at:
                raise torch.OutOfMemoryError("on purpose")
            self.count += 1
        return function(*args, **(kwargs or {}))


def grown(plan, counts, rows):
    layer = new_layer(plan)
    generator = torch.Generator().manual_seed(0)
    for count in counts:
        feed(layer, *random_entries(generator, rows, count, layer.seq_len * rows))
    return layer


SITUATIONS = {
    "a first prompt": ((), 20),
    "a token that fits": ((20,), 1),
    "a token that leads to eviction": ((20, 1, 1), 1),
    "another turn": ((20, 1), 9),
    "growing storage": ((2,), 2),
}


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize(("before", "count"), SITUATIONS.values(), ids=SITUATIONS)
def test_the_cache_is_whole_whichever_allocation_fails(before, count, ragged):
    start = grown(worth_plan(ragged=ragged), before, rows=2)
    entries = random_entries(torch.Generator().manual_seed(1), 2, count, first_name=1000)
    counting, layer = RunsOut(), copy.deepcopy(start)
    with counting:
        feed(layer, *entries)
    assert counting.count > 5
    for at in range(counting.count):
        layer = copy.deepcopy(start)
        with pytest.raises(torch.OutOfMemoryError), RunsOut(at):
            feed(layer, *entries)
        for store in layer.storage.stores:
            store.check_integrity()
        if layer.seq_len > start.seq_len:  # the forward had begun
            with pytest.raises(CacheError, match="failed"):
                feed(layer, *entries)
        layer.reset()
        feed(layer, *entries)


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("change", ["crop", "reorder"])
def test_moving_rows_and_undoing_tokens_fail_as_a_whole(change, ragged):
    start = grown(worth_plan(ragged=ragged, budget=6, every=6), (20, 1), rows=2)
    start.activate_past_recording()
    for count in (3, 3):
        feed(start, *random_entries(torch.Generator().manual_seed(1), 2, count, first_name=1000))

    def changed(layer):
        layer.crop(-2) if change == "crop" else layer.reorder_cache(torch.tensor([1, 0]))

    counting, layer = RunsOut(), copy.deepcopy(start)
    with counting:
        changed(layer)
    assert counting.count > 2
    for at in range(counting.count):
        layer = copy.deepcopy(start)
        with pytest.raises(torch.OutOfMemoryError), RunsOut(at):
            changed(layer)
        for store in layer.storage.stores:
            store.check_integrity()
        with pytest.raises(CacheError, match="failed"):
            feed(layer, *random_entries(torch.Generator().manual_seed(1), 2, 1))
