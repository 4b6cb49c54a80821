"""Modes of torch, and ways to drive generation, under which an attached model does what the plain one does."""

import gc
import weakref

import pytest
import torch

import kvpolicy
from kvpolicy.integrations.transformers.attention_function import managed_modules
from tests.support import fingerprint
from tests.support.models import build, difference, generate, prompt
from tests.support.policies import NAMES, small

STORES = {
    "kivi": {"use": "kivi", "bits": 4, "group": 4, "residual": 4, "batch": 4},
    "fp8": {"use": "fp8", "residual": 4, "batch": 2},
    "plain": "plain",
}


@pytest.mark.parametrize("name", ["full", *NAMES])
def test_a_prefix_in_inference_mode_is_continued_without_it(name):
    model, tokens = build(), prompt(30)[0]
    policy = kvpolicy.load("full") if name == "full" else small(name)
    with policy.attach(model) as attachment:
        found = []
        for mode in (torch.no_grad, torch.inference_mode):
            cache = attachment.cache()
            with mode():
                model(tokens[:, :20], past_key_values=cache)
            found.append(generate(model, tokens, count=6, past_key_values=cache))
            generate(model, torch.cat([tokens, tokens], 1), count=2, past_key_values=attachment.cache())
    assert torch.equal(found[0].sequences, found[1].sequences)


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_what_is_stored_in_inference_mode_can_be_undone_and_moved_outside(store):
    model, tokens = build(), prompt(30)[0]
    with kvpolicy.load("full", store=store).attach(model) as attachment:
        cache = attachment.cache()
        with torch.inference_mode():
            cache.activate_past_recording()
            model(tokens, past_key_values=cache)
            model(tokens[:, :3], past_key_values=cache)
        with torch.no_grad():
            cache.crop(-2)
            cache.reorder_cache(torch.tensor([0, 0]))
            assert model(tokens[:, :1].expand(2, 1), past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_autocast_gives_what_it_gives_without_a_policy(implementation):
    model, given = build(), prompt(40, 29)
    model.set_attn_implementation(implementation)

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return generate(model, *given, count=8)

    plain = run()
    with kvpolicy.load("full").attach(model) as attachment:
        assert difference(run(), plain) == 0
        assert attachment.plan.dtype == torch.float32
    with small("snapkv", budget=64).attach(model):
        assert difference(run(), plain) == 0


@pytest.mark.parametrize("name", ["snapkv", "adakv", "rkv"])
def test_under_autocast_scores_are_computed_in_full_precision(name, monkeypatch):
    model, tokens, seen = build(), prompt(24)[0], []
    weighted_sum = kvpolicy.plan.compress.scored.weighted_sum

    def noted(*args, **options):
        scores, observed = weighted_sum(*args, **options)
        seen.append((torch.is_autocast_enabled("cpu"), scores.dtype, args[1].keys.dtype))
        return scores, observed

    monkeypatch.setattr(kvpolicy.plan.compress.scored, "weighted_sum", noted)
    with small(name).attach(model), torch.autocast("cpu", dtype=torch.bfloat16):
        generate(model, tokens, count=6)
    assert set(seen) == {(False, torch.float32, torch.float32)}


def test_a_compiled_forward_runs_with_a_policy():
    model, tokens = build(num_hidden_layers=2), prompt(30)[0]
    plain = generate(model, tokens, count=6)
    with small("snapkv").attach(model):
        evicted = generate(model, tokens, count=6)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    try:
        with kvpolicy.load("full").attach(model):
            assert difference(generate(model, tokens, count=6), plain) == 0
        with small("snapkv").attach(model):
            assert difference(generate(model, tokens, count=6), evicted) == 0
    finally:
        torch._dynamo.reset()


# -- drafts with the first layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "streaming_llm", "snapkv", "adakv"])
def test_drafts_with_the_first_layers_give_the_tokens_of_plain_decoding(name):
    model, tokens = build(num_hidden_layers=4), prompt(40)[0]
    policy = kvpolicy.load("full") if name == "full" else small(name, budget=128)
    before = fingerprint.of_model(model)
    plain = generate(model, tokens, count=12)
    with policy.attach(model):
        found = generate(model, tokens, count=12, assistant_early_exit=2)
        assert model.config.num_hidden_layers == 4
    assert torch.equal(found.sequences, plain.sequences)
    assert fingerprint.of_model(model) == before
    assert difference(generate(model, tokens, count=12), plain) == 0


def test_a_draft_that_fails_does_not_leave_the_model_with_its_first_layers(monkeypatch):
    model, tokens = build(num_hidden_layers=4), prompt(40)[0]
    before = fingerprint.of_model(model)
    plain = generate(model, tokens, count=4)
    attention = model.model.layers[1].self_attn

    def fail(*_args):
        if model.config.num_hidden_layers == 2:
            raise RuntimeError("on purpose")

    with kvpolicy.load("full").attach(model):
        handle = attention.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            generate(model, tokens, count=4, assistant_early_exit=2)
        handle.remove()
        assert difference(generate(model, tokens, count=4), plain) == 0
        handle = attention.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            generate(model, tokens, count=4, assistant_early_exit=2)
    handle.remove()
    assert fingerprint.of_model(model) == before


# -- what is left when it is over ------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [False, True])
def test_nothing_of_an_attachment_outlives_it(graph):
    model, tokens = build(), prompt(30)[0]
    attachment = small("snapkv").attach(model, graph=graph)
    generate(model, tokens, count=6)
    cache = attachment.cache()
    gone = [weakref.ref(one) for one in (attachment, attachment.uncompressed, cache, cache.managed[0])]
    attachment.detach()
    del attachment, cache
    gc.collect()
    assert [one() for one in gone] == [None] * len(gone)
    assert len(managed_modules) == 0
