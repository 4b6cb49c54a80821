"""Assisted decoding: candidates are verified on what decoding alone would hold, so the answer is the same."""

import contextlib

import pytest
import torch

from kvpolicy.errors import CacheError
from tests.support.alone import assert_greedy
from tests.support.decisions import Decisions
from tests.support.models import build, difference, generate, model, prompt
from tests.support.policies import held, small

NAMES = ("snapkv", "h2o", "adakv")


def repeating(length=40):
    """A prompt with repetitions, in which a lookup finds something."""
    return prompt(8)[0].repeat(1, length // 8)


@pytest.fixture
def assistant():
    one = build(seed=1)
    one.generation_config.num_assistant_tokens = 3
    return one


def ways(assistant):
    return {"lookup": {"prompt_lookup_num_tokens": 3}, "model": {"assistant_model": assistant}}


@pytest.mark.parametrize("way", ["lookup", "model"])
@pytest.mark.parametrize("name", NAMES)
def test_a_large_budget_gives_what_plain_decoding_gives(name, way, assistant):
    """Bit for bit what the same way of decoding gives; and that is what one token at a time would have given."""
    tokens, options = repeating(), ways(assistant)[way]
    plain = generate(model(), tokens, **options)
    with small(name, budget=200).attach(model()):
        attached = generate(model(), tokens, **options)
    assert torch.equal(attached.sequences, plain.sequences)
    assert difference(attached, plain) == 0
    assert_greedy(model(), attached.sequences, tokens.shape[1])


EVICTING = {
    "snapkv": lambda: small("snapkv"),
    "every token": lambda: small("h2o", every=1),
    "ragged": lambda: small("adakv", every=3),
    "merging": lambda: small("h2o", merge={"use": "d2o"}),
    "votes": lambda: small("snapkv", merge={"use": "keepkv", "threshold": -1, "window": 4}),
    "packing": lambda: small("snapkv", store={"use": "kivi", "bits": 4, "group": 4, "residual": 4, "batch": 4}),
    "pages": lambda: small("snapkv", read={"use": "pages", "page": 4, "budget": 8, "dense_first": 0}),
}


@pytest.mark.parametrize("way", ["lookup", "model", "twin"])
@pytest.mark.parametrize("policy", EVICTING.values(), ids=EVICTING)
def test_under_eviction_the_answer_is_that_of_decoding_alone(policy, way, assistant):
    """The twin of the model, with the same policy attached, guesses most tokens; the others guess few."""
    one, tokens, twin = model(), repeating(), build()
    twin.generation_config.num_assistant_tokens = 5
    given = {**ways(assistant), "twin": {"assistant_model": twin}}[way]
    with policy().attach(one) as attachment, contextlib.ExitStack() as stack:
        alone = generate(one, tokens)
        if way == "twin":
            stack.enter_context(policy().attach(twin))
        forwards = []
        handle = one.register_forward_hook(lambda *_: forwards.append(1))
        assisted = generate(one, tokens, **given)
        handle.remove()
        entries = [layer.held for layer in attachment.report().layers]
    assert_same_answer(assisted, alone)
    assert max(entries) < 20
    if way == "twin":
        assert len(forwards) < 16


def assert_same_answer(assisted, alone):
    """Equal tokens and logits up to rounding; behind a near tie of two tokens the answers may part."""
    for step, (left, right) in enumerate(zip(assisted.logits, alone.logits, strict=True)):
        assert torch.allclose(left, right, rtol=0, atol=1e-3), step
        best = right.topk(2).values[0]
        if best[0] - best[1] < 1e-3:
            return
        assert assisted.sequences[0, 40 + step] == alone.sequences[0, 40 + step]


@pytest.mark.parametrize("way", ["lookup", "model"])
@pytest.mark.parametrize("name", NAMES)
def test_the_bound_holds_after_every_round(name, way, assistant, monkeypatch):
    with small(name).attach(model()) as attachment:
        cache = attachment.cache()
        after_forward, crop, seen = [], type(cache).crop, []

        def watched(self, count):
            after_forward.append([sum(map(sum, layer.storage.slots.lengths)) for layer in self.managed])
            seen.append(self.get_seq_length())
            crop(self, count)
            assert all(sum(map(sum, layer.storage.slots.lengths)) <= 2 * (12 + 4 - 1) for layer in self.managed)
            self.check_integrity()

        monkeypatch.setattr(type(cache), "crop", watched)
        out = generate(model(), repeating(), past_key_values=cache, **ways(assistant)[way])
        assert out.sequences.shape[1] == 64
        assert all(layer.compressions for layer in attachment.report().layers)
    assert max(after_forward[0]) < 2 * 40 <= 2 * seen[0]  # the prompt was compressed before its candidates came


def test_a_policy_on_the_assistant_keeps_what_a_rollback_needs(assistant):
    """The assistant's own cache is handed back to its `generate` every round, and cropped in between."""
    tokens = repeating()
    with small("streaming_llm").attach(assistant) as attachment:
        out = generate(model(), tokens, assistant_model=assistant)
        assert all(layer.compressions for layer in attachment.report().layers)
    assert_greedy(model(), out.sequences, tokens.shape[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_for_prompts_only_compresses_the_prompt(name):
    with small(name, every="never").attach(model()) as attachment:
        generate(model(), repeating(), prompt_lookup_num_tokens=3)
        assert all(layer.compressions == 1 and layer.held < 12 + 26 for layer in attachment.report().layers)


def test_a_cache_goes_on_evicting_at_once_after_assisted_decoding():
    tokens = repeating()
    with small("snapkv").attach(model()) as attachment:
        cache = attachment.cache()
        out = generate(model(), tokens, past_key_values=cache, prompt_lookup_num_tokens=3).sequences
        generate(model(), torch.cat([out, tokens], 1), past_key_values=cache, count=1)
        assert all(layer.held == 12 for layer in attachment.report().layers)


@pytest.mark.parametrize("name", NAMES)
def test_verified_tokens_leave_what_they_would_have_left_one_by_one(name):
    """Rejected candidates leave no trace: neither entries nor votes nor attention."""
    tokens, _ = prompt(50)
    with small(name, budget=30, every=20).attach(model()) as attachment, torch.no_grad():
        caches, decisions = [attachment.cache(), attachment.cache()], Decisions()
        for cache, mode, candidates in zip(caches, (decisions.watched, decisions.followed), (5, 1), strict=True):
            with mode():
                cache.activate_past_recording()
                model()(tokens[:, :20], past_key_values=cache)
                cache.crop(0)
                model()(tokens[:, 20 : 20 + candidates], past_key_values=cache)
                cache.crop(1 - candidates)
                model()(tokens[:, 21:], past_key_values=cache)
                cache.crop(0)
    assert held(caches[0]) == held(caches[1])
    assert [layer.storage.slots.lengths for layer in caches[0].managed] != [((50, 50),)] * 3


@pytest.mark.parametrize("name", ["pyramidkv", "snapkv"])
def test_undoing_evicted_tokens_is_refused_before_any_layer_has_changed(name):
    with small(name, budget=20, protect={"recent": 2}).attach(model()) as attachment, torch.no_grad():
        cache = attachment.cache()
        model()(prompt(30)[0], past_key_values=cache)
        for token in range(2, 5):
            model()(torch.tensor([[token]]), past_key_values=cache)
            before = held(cache)
            with pytest.raises(CacheError, match="undo"):
                cache.crop(-6)
            assert held(cache) == before
            assert [layer.seq_len for layer in cache.managed] == [28 + token + 1] * 3


def test_a_cache_left_in_the_middle_of_assisted_decoding_goes_on_evicting():
    tokens, _ = prompt(40)
    with small("snapkv").attach(model()) as attachment, torch.no_grad():
        cache = attachment.cache()
        cache.activate_past_recording()
        model()(tokens[:, :30], past_key_values=cache)
        generate(model(), tokens, past_key_values=cache, count=1)
        assert all(layer.held == 12 for layer in attachment.report().layers)


def test_crop_takes_a_tensor():
    """Transformers 5.16 crops by a tensor: counts must stay numbers, or layers would share them."""
    tokens, _ = prompt(30)
    with small("snapkv").attach(model()) as attachment, torch.no_grad():
        cache = attachment.cache()
        cache.activate_past_recording()
        model()(tokens[:, :20], past_key_values=cache)
        cache.crop(torch.tensor(-2))
        model()(tokens[:, 18:], past_key_values=cache)
        cache.crop(torch.tensor(0))
        assert cache.get_seq_length() == 30
        assert all(type(layer.seq_len) is int and layer.num_tokens == [30] for layer in cache.managed)
