"""Reports count every byte that a cache holds: against a walk over all that can be reached from it."""

import gc
import json

import pytest
import torch

import kvpolicy
from kvpolicy.plan.explain import explain
from kvpolicy.plan.plan import Plan
from tests.support.models import build, generate, model, prompt
from tests.support.policies import small

SLIDING = {"architecture": "gemma3", "head_dim": 8}


def reached(thing):
    """Bytes of the storages of all tensors that can be reached from an object, its plan and the model left out."""
    storages, waiting, known = {}, [thing], set()
    while waiting:
        one = waiting.pop()
        if id(one) in known or isinstance(one, (Plan, type, torch.nn.Module, str, bytes, int, float)):
            continue
        known.add(id(one))
        if isinstance(one, torch.Tensor):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set)):
            waiting += one
        elif type(one).__module__.split(".")[0] in ("kvpolicy", "transformers"):
            waiting += vars(one).values() if hasattr(one, "__dict__") else ()
            names = {name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ())}
            waiting += [getattr(one, name) for name in names if name != "__weakref__" and hasattr(one, name)]
    return sum(storages.values())


POLICIES = {
    "snapkv": small("snapkv"),
    "adakv": small("adakv"),
    "h2o": small("h2o"),
    "gkv": small("gkv"),
    "pyramidkv": small("pyramidkv"),
    "keepkv": small("keepkv"),
    "d2o": small("d2o"),
    "tova": small("tova", protect={}),
    "kivi": small("snapkv", store={"use": "kivi", "bits": 4, "group": 4, "residual": 4, "batch": 4}),
    "tada": small("h2o", store={"use": "tada", "residual": 4, "batch": 4}),
    "quest": kvpolicy.load("quest", read={"use": "pages", "page": 4, "budget": 16, "dense_first": 0}),
    "full": kvpolicy.load("full"),
}


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_report_counts_every_byte(name, architecture):
    """After a prompt with pads, after decode steps between and at compressions, and after another turn."""
    one, (tokens, mask) = model(architecture), prompt(40, 33)
    with POLICIES[name].attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        for count in (40, 1, 1, 1, 5, 1):
            tokens, fresh = prompt(count, count) if count < 40 else (tokens, mask)
            mask = mask if count == 40 else torch.cat([mask, fresh], 1)
            one(tokens, attention_mask=mask, past_key_values=cache)
            report = attachment.report()
            assert report.nbytes == reached(cache)
            assert report.parts["entries"] == sum(layer.storage.nbytes for layer in cache.managed)
            assert report.parts["window"] == sum(layer.window.nbytes for layer in cache.managed)
        stock = [layer for layer in cache.layers if layer not in cache.managed]
        assert report.parts["other_layers"] == reached(stock)
        assert (report.parts["other_layers"] > 0) == (architecture == "gemma3")


def test_bytes_of_a_cache_that_is_gone_are_known():
    """What `generate` made and dropped; layers that are not managed included. Segment tables need not be."""
    one = model("gemma3")
    with small("snapkv").attach(one) as attachment:
        generate(one, *prompt(40))
        gone = attachment.report()
        cache = attachment.cache()
        generate(one, *prompt(40), past_key_values=cache)
        live = attachment.report()
        del cache
        gc.collect()
        again = attachment.report()
    assert gone.parts["other_layers"] == live.parts["other_layers"] > 0
    for part in ("entries", "window"):
        assert gone.parts[part] == live.parts[part] == again.parts[part] > 0
    assert again.nbytes == live.nbytes


def test_queries_that_may_be_undone_are_counted():
    one = model()
    with small("snapkv").attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        cache.activate_past_recording()
        one(prompt(30)[0], past_key_values=cache)
        report = attachment.report()
        assert report.parts["state"] >= 3 * 30 * 4 * 8 * 4
        assert report.nbytes == reached(cache)
        cache.crop(-2)
        assert attachment.report().nbytes == reached(cache)


def test_steps_of_fixed_shapes_are_counted_beside_the_entries():
    one = build()
    with small("snapkv", every=2).attach(one, graph=True) as attachment:
        generate(one, *prompt(40), count=8)
        report = attachment.report()
        session = attachment._decode._session
        assert report.parts["static"] == session.nbytes > 0
        assert report.parts["entries"] == sum(layer.storage.nbytes for layer in session.layers)
        assert report.parts["window"] == sum(layer.window.nbytes for layer in session.layers)
        assert report.layers[0].held == pytest.approx(12, abs=2)


def test_the_window_is_in_a_report_and_its_json():
    """At a small budget the queries that vote weigh more than the entries."""
    one = model()
    with small("snapkv").attach(one) as attachment:
        generate(one, *prompt(60))
        report = attachment.report()
    data = json.loads(json.dumps(report.to_dict()))
    assert data["bytes"]["window"] == 3 * 32 * (4 * 8 * 4 + 4) > data["bytes"]["entries"]
    assert data["bytes_held"] == sum(data["bytes"].values()) == report.nbytes
    assert [layer["nbytes"] for layer in data["layers"]] == [layer.nbytes for layer in report.layers]
    assert "queries observed for scorers and mergers" in str(report)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "d2o"])
def test_a_plan_counts_layers_with_a_sliding_window(name):
    """What a real cache holds once the sequence has grown, and what one without a policy holds."""
    one, policy = model("gemma3"), small(name)
    with policy.attach(one) as attachment:
        cache = attachment.cache()
        generate(one, *prompt(60), past_key_values=cache, count=20)
        report = attachment.report()
        found = explain(attachment.plan, 79)
    full = generate(one, *prompt(60), count=20).past_key_values
    assert found.geometry.windows == (16,)
    assert (found.held_bytes, found.window_bytes) == (report.parts["entries"], report.parts["window"])
    assert found.stock_bytes == sum(t.untyped_storage().nbytes() for t in (full.layers[0].keys, full.layers[0].values))
    assert report.parts["other_layers"] == found.stock_bytes + 8  # and the library's tensor of the window's size
    exact = [(layer.keys, layer.values) for layer in full.layers if not layer.is_sliding]
    assert found.full_bytes == found.stock_bytes + sum(key.nbytes + value.nbytes for key, value in exact)
    assert found.total_bytes == found.held_bytes + found.window_bytes + found.state_bytes + found.stock_bytes
    assert found.to_dict()["share_of_full"] == found.total_bytes / found.full_bytes
    assert "layers with a sliding window" in str(found)


@pytest.mark.parametrize("name", ["snapkv", "d2o", "keepkv", "adakv"])
def test_a_budget_in_bytes_covers_the_window_and_the_state(name):
    """Whatever is held for the layers that the policy manages, at every step."""
    size = 60 * 1024
    policy = kvpolicy.load(name, budget="60KiB", protect={"recent": 4}, compress={"every": 4})
    one, tokens = model(), prompt(150)[0]
    with policy.attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        for step in range(10):
            one(tokens if not step else tokens[:, :1], past_key_values=cache)
            report = attachment.report()
            tables = sum(t.nbytes for layer in cache.managed for t in layer.storage.index_tensors)
            assert report.nbytes - tables <= size
        one_more = attachment.plan.footprint.entry_bytes * 3 * 2
        assert report.nbytes + 5 * one_more > size
