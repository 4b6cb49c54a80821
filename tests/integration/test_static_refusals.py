"""What steps of fixed shapes refuse, and what goes wrong in them, is said."""

import copy

import attrs
import pytest
import torch

from kvpolicy.errors import (
    CacheError,
    KVPolicyError,
    NonFiniteScoreWarning,
    ParameterError,
    PolicyError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from kvpolicy.stages import Selector
from kvpolicy_plugins.selectors.topk import TopK
from tests.integration.static_steps import fed
from tests.support import fingerprint
from tests.support.models import build, generate, model, prompt
from tests.support.policies import held, small


def test_nan_is_counted_and_said(steps):
    one = build()
    with small("rkv").attach(one, graph=True) as attachment, torch.no_grad():
        cache, tokens = attachment.cache(), prompt(30)[0]
        fed(one, cache, tokens, 20, 21, 22)
        steps[0].layers[1].storage.keys.residual.dense("keys")[0, :, 3, 0] = torch.nan
        with pytest.warns(NonFiniteScoreWarning, match="scores are NaN"):
            fed(one, cache, tokens, *range(23, 27))


REFUSED = {
    "allocate.heads": small("adakv"),
    "compress.every": small("snapkv", every="never"),
    "budget": small("snapkv", budget="10%"),
    "score": small("compactor", budget=16),
    "merge": small("d2o"),
    "store": small("snapkv", store={"use": "fp8", "batch": 2}),
    "read": small("snapkv", read={"use": "pages", "page": 4, "budget": 8}),
}


@pytest.mark.parametrize("place", REFUSED)
def test_what_fixed_shapes_cannot_serve_is_refused_before_anything_changes(place):
    one = build()
    before = fingerprint.of_model(one)
    with pytest.raises(PolicyError, match="graph: ") as raised:
        REFUSED[place].attach(one, graph=True)
    assert [problem.where for problem in raised.value.problems] == [place]
    assert fingerprint.of_model(one) == before


def test_a_model_with_sliding_layers_is_refused():
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        small("snapkv").attach(model("gemma3"), graph=True)


@pytest.mark.parametrize("graph", ["reduce-overhead", 1, "", ("compile",)])
def test_another_way_to_run_steps_is_refused(graph):
    with pytest.raises(ParameterError, match="graph"):
        small("snapkv").attach(model(), graph=graph)


def test_a_step_that_fails_leaves_a_cache_that_nobody_can_go_on_with(steps, monkeypatch):
    one, tokens = model(), prompt(40)[0]
    with small("snapkv").attach(one, graph=True) as attachment, torch.no_grad():
        cache = attachment.cache()
        fed(one, cache, tokens, 20, 21, 22)
        with monkeypatch.context() as broken:
            broken.setattr(steps[0]._step, "forward", lambda **_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                one(tokens[:, 22:23], past_key_values=cache)
        with pytest.raises(KVPolicyError, match="failed"):
            one(tokens[:, 22:23], past_key_values=cache)
        assert generate(one, tokens[:, :20]).sequences.shape == (1, 44)


@attrs.frozen
class Fewer(Selector):
    """Keeps one entry less than it should."""

    name = "fewer"

    def select(self, request):
        return TopK().select(attrs.evolve(request, counts=request.counts - 1))


LEAVE = {
    "several tokens": lambda one, cache: fed(one, cache, prompt(40)[0], 34),
    "rollback": lambda one, cache: cache.crop(-1),
    "moved rows": lambda one, cache: cache.reorder_cache(torch.tensor([0])),
    "fork": lambda one, cache: cache.fork(),
    "copy": lambda one, cache: copy.deepcopy(cache),
    "check": lambda one, cache: cache.check_integrity(),
}


@pytest.mark.parametrize("leave", LEAVE.values(), ids=LEAVE)
def test_a_plugin_that_keeps_another_count_is_found_out(leave, steps):
    policy = small("snapkv")
    policy = attrs.evolve(policy, spec=attrs.evolve(policy.spec, select=Fewer()))
    with policy.attach(model(), graph=True) as attachment:
        cache = attachment.cache()
        fed(model(), cache, prompt(40)[0], 20, *range(21, 31))
        with pytest.raises(CacheError, match="instead of"):
            leave(model(), cache)
    assert steps


def test_when_another_cache_enters_such_a_count_is_said_and_the_first_has_its_own_entries(steps):
    policy = small("snapkv")
    policy = attrs.evolve(policy, spec=attrs.evolve(policy.spec, select=Fewer()))
    with policy.attach(model(), graph=True) as attachment:
        caches = [attachment.cache() for _ in range(2)]
        fed(model(), caches[0], prompt(40)[0], 20, *range(21, 30))
        fed(model(), caches[1], prompt(40, seed=1)[0], 10, 11)
        with pytest.raises(CacheError, match="instead of"):
            fed(model(), caches[1], prompt(40, seed=1)[0], 12)
        storages = [layer.storage for layer in steps[-1].layers]
        assert not any(layer.storage is ours for layer, ours in zip(caches[0].managed, storages, strict=True))
        with pytest.raises(CacheError, match="failed"):
            caches[0].crop(-1)
        caches[1].reset()
        fed(model(), caches[1], prompt(40, seed=1)[0], 10, 11, 12)
        assert all(layer.storage is ours for layer, ours in zip(caches[1].managed, storages, strict=True))


@pytest.mark.parametrize("leave", LEAVE.values(), ids=LEAVE)
def test_a_fault_that_the_device_has_counted_is_said_when_a_cache_leaves(leave, steps):
    """As on a GPU, where it is not known when the step returns."""
    with small("snapkv").attach(model(), graph=True) as attachment:
        cache = attachment.cache()
        fed(model(), cache, prompt(40)[0], 20, *range(21, 24))
        steps[-1].faults.masks.add_(1)
        with pytest.raises(UnsupportedCallError, match="hides tokens"):
            leave(model(), cache)


def test_a_cache_whose_step_failed_can_still_be_copied_and_read(steps, monkeypatch):
    one, tokens = model(), prompt(40)[0]
    with small("snapkv").attach(one, graph=True) as attachment, torch.no_grad():
        cache = attachment.cache()
        fed(one, cache, tokens, 20, 21, 22)
        monkeypatch.setattr(steps[0]._step, "forward", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one(tokens[:, 22:23], past_key_values=cache)
        other = copy.deepcopy(cache)
        assert other.get_seq_length() == cache.get_seq_length() == 22
        assert held(other) == held(cache)
        with pytest.raises(CacheError, match="failed"):
            other.crop(-1)
