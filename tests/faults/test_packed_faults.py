"""Stores, mergers and readers that raise, and memory that runs out while entries are packed."""

import copy

import pytest
import torch

import kvpolicy
from kvpolicy.errors import CacheError
from kvpolicy_plugins.codecs.kivi import PerChannel
from kvpolicy_plugins.codecs.shared.per_token import PerToken
from kvpolicy_plugins.mergers.keepkv import KeepKV
from kvpolicy_plugins.mergers.shared.score_estimates import MovingAverage
from kvpolicy_plugins.readers.pages import Pages
from kvpolicy_plugins.readers.shared.page_bounds import Bounds
from tests.faults.test_memory_runs_out import RunsOut
from tests.faults.test_stages_raise import ERRORS, Failing, steps
from tests.property.test_packed_layers import entries, plan_of
from tests.support import fingerprint
from tests.support.driving import feed, new_layer
from tests.support.models import build, difference, generate, prompt

PLACES = {
    "packing values": (PerToken, "encode"),
    "unpacking values": (PerToken, "decode_in_basis"),
    "packing keys": (PerChannel, "encode"),
    "unpacking keys": (PerChannel, "decode_in_basis"),
    "merging": (KeepKV, "merge"),
    "following": (MovingAverage, "updated"),
    "choosing": (Pages, "choose"),
    "making pages": (Bounds, "encode"),
}


def packed_policy():
    return kvpolicy.load(
        "snapkv",
        budget=16,
        compress={"every": 4},
        protect={"sinks": 2, "recent": 4},
        store={"use": "kivi", "bits": 4, "group": 4, "residual": 4, "batch": 4},
        merge={"use": "keepkv", "window": 4, "threshold": -1},
        read={"use": "pages", "page": 4, "budget": 8, "dense_first": 0},
    )


@pytest.mark.parametrize(
    ("stage", "method", "call"),
    [pytest.param(*PLACES[name], 4 * (index % 2), id=name) for index, name in enumerate(PLACES)],  # early, or later
)
def test_after_it_has_raised_all_is_well(stage, method, call, monkeypatch):
    one, tokens = build(), prompt(40, 29)
    plain = fingerprint.of_model(one)
    with packed_policy().attach(one) as attachment:
        expected, attached = generate(one, *tokens), fingerprint.of_model(one)
        other, steady = attachment.cache(), []
        steps(one, other, tokens[0], 2)
        for error in ERRORS:
            cache = attachment.cache()
            with monkeypatch.context() as patch:
                patch.setattr(stage, method, Failing(getattr(stage, method), call, error))
                with pytest.raises(error, match="on purpose"):
                    steps(one, cache, tokens[0], 12)
            cache.check_integrity()
            assert fingerprint.of_model(one) == attached
            with pytest.raises(CacheError, match="failed"):
                steps(one, cache, tokens[0])
            with torch.no_grad():
                steady.append(one(tokens[0][:, :1], past_key_values=copy.deepcopy(other)).logits)
        assert difference(generate(one, *tokens), expected) == 0
        assert all(torch.equal(logits, steady[0]) for logits in steady)
    assert fingerprint.of_model(one) == plain


SITUATIONS = {"a first prompt": ((), 20), "packing in passing": ((8, 1), 1), "eviction": ((20, 1, 1, 1), 1)}
FORMS = ("kivi", "tada", "fp8", "latent")


@pytest.mark.parametrize("store", FORMS)
@pytest.mark.parametrize(("before", "count"), SITUATIONS.values(), ids=SITUATIONS)
def test_a_packed_layer_says_that_it_failed_whichever_allocation_fails(store, before, count):
    plan = plan_of(store, 12, 4, merge={"use": "keepkv", "threshold": -1, "window": 4})
    start, generator = new_layer(plan), torch.Generator().manual_seed(0)
    for size in before:
        feed(start, *entries(generator, 2, size))
    given = entries(generator, 2, count)
    counting, whole = RunsOut(), copy.deepcopy(start)
    with counting:
        expected = feed(whole, *given)
    assert counting.count > 10
    for at in range(0, counting.count, 9):
        layer = copy.deepcopy(start)
        with pytest.raises(torch.OutOfMemoryError), RunsOut(at):
            feed(layer, *given)
        for store_ in layer.storage.stores:
            store_.check_integrity()
        if layer.seq_len > start.seq_len:
            with pytest.raises(CacheError, match="failed"):
                feed(layer, *given)
    assert torch.equal(feed(copy.deepcopy(start), *given), expected)
