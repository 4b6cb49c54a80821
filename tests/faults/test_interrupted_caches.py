"""A cache is whole or refused: what did not reach its end, in whichever layer, is never gone on from."""

import contextlib
import copy

import pytest
import torch

import kvpolicy
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.errors import CacheError
from tests.support.interrupts import Interrupts, failing, forward
from tests.support.models import build, model, prompt
from tests.support.policies import small

POLICIES = {
    "full": lambda: kvpolicy.load("full"),
    "snapkv": lambda: small("snapkv"),
    "adakv": lambda: small("adakv"),
    "kivi": lambda: kvpolicy.load("kivi4", store={"use": "kivi", "bits": 4, "group": 4, "residual": 4, "batch": 4}),
}
TOKENS = prompt(40)[0]
NEXT = TOKENS[:, :1]


def parts(one):
    """What is run after a layer has recorded its tokens: every MLP, the norm behind the last layer, and the head."""
    return [layer.mlp for layer in one.model.layers] + [one.model.norm, one.lm_head]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_forward_that_failed_between_or_behind_the_layers_is_not_gone_on_from(policy, architecture):
    one = model(architecture)
    with policy().attach(one) as attachment:
        start = attachment.cache()
        expected = forward(one, start, TOKENS), forward(one, copy.deepcopy(start), NEXT)
        for part in parts(one):
            for cache, tokens in ((attachment.cache(), TOKENS), (copy.deepcopy(start), NEXT)):
                with pytest.raises(torch.OutOfMemoryError), failing(part):
                    forward(one, cache, tokens)
                with pytest.raises(CacheError, match="failed"):
                    forward(one, cache, tokens)
                with pytest.raises(CacheError, match="failed"):
                    cache.reorder_cache(torch.tensor([0]))
                with pytest.raises(CacheError, match="failed"):
                    cache.crop(-1)
                cache.reset()
                assert torch.equal(forward(one, cache, TOKENS), expected[0])
                assert torch.equal(forward(one, cache, NEXT), expected[1])


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_without_announcements_the_layer_that_is_updated_again_finds_the_fault(architecture):
    one = model(architecture)
    with small("snapkv").attach(one) as attachment, torch.no_grad():
        for layer in one.model.layers[:-1]:
            cache = attachment.cache()
            one.model(TOKENS, past_key_values=cache)
            with pytest.raises(torch.OutOfMemoryError), failing(layer.mlp):
                one.model(NEXT, past_key_values=cache)
            with pytest.raises(CacheError, match="failed"):
                one.model(NEXT, past_key_values=cache)
            cache.reset()
            one.model(TOKENS, past_key_values=cache)
            one.model(NEXT, past_key_values=cache)


def test_a_layer_that_was_left_out_is_found_when_the_forward_ends():
    one = build()
    with small("snapkv").attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        forward(one, cache, TOKENS)
        one.model.layers, layers = one.model.layers[:2], one.model.layers
        with pytest.raises(CacheError, match=r"layers \[2\] did not take part"):
            forward(one, cache, NEXT)
        one.model.layers = layers
        with pytest.raises(CacheError, match="failed"):
            forward(one, cache, NEXT)


def test_a_model_that_always_leaves_out_its_last_layer_is_compressed_at_the_end_of_a_forward():
    one = build()
    with small("h2o").attach(one) as attachment:
        one.model.layers = one.model.layers[:2]
        cache = attachment.cache()
        forward(one, cache, TOKENS)
        for _ in range(9):
            forward(one, cache, NEXT)
        assert [layer.compressions for layer in cache.stats] == [3, 3, 0]
        cache.activate_past_recording()
        forward(one, cache, NEXT)
        cache.crop(-1)
        assert [layer.seq_len for layer in cache.managed] == [49, 49, 0]


def test_a_forward_that_was_refused_before_any_layer_took_its_tokens_leaves_the_cache_whole():
    one = model()
    with small("snapkv").attach(one) as attachment:
        cache = attachment.cache()
        forward(one, cache, TOKENS)
        expected = forward(one, copy.deepcopy(cache), NEXT)
        with pytest.raises(IndexError):
            forward(one, cache, torch.tensor([[10**6]]))
        assert torch.equal(forward(one, cache, NEXT), expected)


def test_attention_that_is_called_twice_for_one_update_is_refused():
    cache = small("snapkv").attach(build()).cache()
    keys, _ = cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    layer = keys.kvpolicy_layer
    batch = QueryBatch(torch.zeros(1, 4, 3, 8), layer.place_tokens(None), padded=False, scaling=1.0)
    layer.attend(batch)
    layer.finish_forward(batch)
    with pytest.raises(CacheError, match="layer 0: attention must be called once"):
        layer.place_tokens(None)


# -- interrupts at any line ------------------------------------------------------------------------------------


def feeding(count):
    return lambda one, cache: forward(one, cache, TOKENS[:, :count])


CHANGES = {  # each the steps of a change, which are tried again one by one
    "a step": [feeding(1)],
    "a turn": [feeding(9)],
    "candidates": [
        lambda _, cache: cache.activate_past_recording(),
        feeding(7),
        lambda _, cache: cache.crop(-2),
        lambda _, cache: cache.stop_recording(),
    ],
    "beams": [
        lambda _, cache: cache.batch_repeat_interleave(2),
        lambda _, cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda _, cache: cache.batch_select_indices(torch.tensor([1])),
    ],
    "reset": [lambda _, cache: cache.reset(), feeding(40)],
}
SHOWN = {"snapkv": POLICIES["snapkv"], "kivi": POLICIES["kivi"]}


def trials(lines, most=24):
    """Lines spread over all that are run, the first and the last among them."""
    return sorted({round(place * (lines - 1) / (most - 1)) for place in range(most)})


@pytest.mark.parametrize("steps", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("policy", SHOWN.values(), ids=SHOWN)
def test_after_an_interrupt_at_any_line_a_retry_is_exact_or_refused(policy, steps):
    one, refused = model(), 0
    with policy().attach(one) as attachment:
        start, fresh = attachment.cache(), attachment.cache()
        for tokens in (TOKENS, NEXT, NEXT, NEXT):  # the next step is one with an eviction
            forward(one, start, tokens)
        new = forward(one, fresh, TOKENS)
        counting, undisturbed, first = Interrupts(), copy.deepcopy(start), copy.deepcopy(start)
        for step in steps:
            step(one, first)  # what copies share about their layouts is computed once
        for step in steps:
            with counting:
                step(one, undisturbed)
        expected = forward(one, undisturbed, NEXT)
        for line in trials(counting.count):
            cache, done, interrupts = copy.deepcopy(start), 0, Interrupts(line)
            with contextlib.suppress(KeyboardInterrupt):
                for step in steps:
                    with interrupts:
                        step(one, cache)
                    done += 1
            assert done < len(steps)
            assert copy.deepcopy(cache).get_seq_length() == cache.get_seq_length()
            try:
                for step in steps[done:]:
                    step(one, cache)
                assert torch.equal(forward(one, cache, NEXT), expected), line
            except CacheError:
                refused += 1
                cache.reset()
                assert torch.equal(forward(one, cache, TOKENS), new), line
    assert refused or steps is CHANGES["reset"]


def test_after_an_interrupt_of_steps_of_fixed_shapes_a_retry_is_exact_or_refused():
    one = model()
    with small("h2o").attach(one, graph=True) as attachment:

        def started():
            cache = attachment.cache()
            for tokens in (TOKENS, NEXT, NEXT):
                forward(one, cache, tokens)
            return cache

        def rest(cache):  # gets in, takes steps with an eviction, gets out
            steps = [forward(one, cache, NEXT) for _ in range(5)]
            return torch.cat([*steps, forward(one, cache, TOKENS[:, :3])], 1)

        expected, counting, refused = rest(started()), Interrupts(), 0
        with counting:
            rest(started())
        for line in trials(counting.count, 40):
            cache = started()
            done = cache.get_seq_length()
            with contextlib.suppress(KeyboardInterrupt), Interrupts(line):
                rest(cache)
                continue  # a storage that was left by an interrupt takes other lines
            at = cache.get_seq_length() - done
            try:
                steps = [forward(one, cache, NEXT) for _ in range(5 - at)]
                found = torch.cat([*steps, forward(one, cache, TOKENS[:, :3])], 1)
                assert torch.equal(found, expected[:, at:]), line
            except CacheError:
                refused += 1
            cache = started()  # whoever comes next finds nothing of it
            assert torch.equal(rest(cache), expected), line
        assert refused
