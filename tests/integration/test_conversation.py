"""Several turns on one cache, and caches that are shared out or copied."""

import copy

import pytest
import torch
from transformers import DynamicCache

from kvpolicy.errors import AttachError, CacheError, UnsupportedCallError
from kvpolicy.integrations.transformers.cache import PolicyCache
from tests.support.decisions import Decisions
from tests.support.models import ARCHITECTURES, build, difference, generate, model, prompt
from tests.support.policies import NAMES, held, small
from tests.support.rounding import close


def two_turns(one, first, second, cache, steps=5):
    answer = generate(one, first, count=steps, past_key_values=cache).sequences
    return generate(one, torch.cat([answer, second], 1), past_key_values=cache)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_second_turn_is_exact_at_a_large_budget(architecture):
    one = model(architecture)
    first, second = prompt(30, 30)[0], prompt(12, 12, seed=1)[0]
    plain = two_turns(one, first, second, DynamicCache(config=one.config))
    with small("adakv", budget=200).attach(one) as attachment:
        attached = two_turns(one, first, second, attachment.cache())
    assert torch.equal(plain.sequences, attached.sequences)
    assert difference(plain, attached) == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_turn_is_brought_down_to_the_budget(name):
    one = model()
    with small(name).attach(one) as attachment:
        cache, text = attachment.cache(), torch.empty(1, 0, dtype=torch.long)
        for turn in range(4):
            text = torch.cat([text, prompt(20, seed=turn)[0]], 1)
            text = generate(one, text, count=1, past_key_values=cache).sequences
            assert cache.get_seq_length() == text.shape[1] - 1
            assert sum(layer.held for layer in attachment.report().layers) == 3 * 12


def test_tokens_after_the_last_eviction_can_be_undone():
    one = model()
    with small("snapkv").attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        one(prompt(30)[0], past_key_values=cache)
        before = held(cache)
        for token in (5, 6, 7):
            logits = one(torch.tensor([[token]]), past_key_values=cache).logits
        cache.crop(-3)
        assert held(cache) == before
        for token in (5, 6, 7):
            again = one(torch.tensor([[token]]), past_key_values=cache).logits
        assert torch.equal(logits, again)


def test_a_reset_cache_is_a_new_one():
    one = model()
    tokens, _ = prompt(40)
    with small("gkv").attach(one) as attachment:
        cache = attachment.cache()
        first = generate(one, tokens, past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        second = generate(one, tokens, past_key_values=cache)
    assert difference(first, second) == 0


def test_a_copied_cache_goes_its_own_way():
    one = model()
    with small("adakv").attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        one(prompt(30)[0], past_key_values=cache)
        before, other = held(cache), copy.deepcopy(cache)
        one(prompt(9, seed=1)[0], past_key_values=other)
        assert held(cache) == before
        assert held(other) != before


@pytest.mark.parametrize("name", ["gkv", "h2o", "adakv"])
def test_rows_are_moved_with_all_that_belongs_to_them(name):
    """Repeating, reordering and selecting rows leads to what those rows give when they run from the start."""
    one = model()
    tokens, _ = prompt(30, 30, 30)
    rows = torch.tensor([2, 0])
    more = prompt(20, 20, seed=1)[0]
    with small(name).attach(one) as attachment, torch.no_grad():
        moved, direct, decisions = attachment.cache(), attachment.cache(), Decisions()
        with decisions.watched():
            one(tokens, past_key_values=moved)
            moved.batch_repeat_interleave(2)
            moved.reorder_cache(torch.tensor([4, 5, 0, 1, 2, 3]))
            moved.batch_select_indices(torch.tensor([True, False, True, False, False, False]))
            logits = one(more, past_key_values=moved).logits
        with decisions.followed():
            one(tokens[rows], past_key_values=direct)
            assert close(one(more, past_key_values=direct).logits, logits)
        assert held(moved) == held(direct)


def test_a_cache_of_another_kind_is_refused():
    with small("snapkv").attach(model()), pytest.raises(UnsupportedCallError, match="DynamicCache"):
        generate(model(), prompt(40)[0], past_key_values=DynamicCache(config=model().config))


def test_a_cache_of_another_policy_follows_its_own():
    one = model()
    with small("snapkv").attach(one):
        cache = small("streaming_llm", budget=9).cache(one)
        generate(one, prompt(40)[0], past_key_values=cache, count=1)
    assert all(len(heads) == 9 for rows in held(cache) for heads in rows[0])


def test_a_cache_needs_an_attached_model():
    with pytest.raises(AttachError, match="attach"):
        small("snapkv").cache(model())


def test_a_cache_used_without_the_attention_of_the_policy_is_refused_at_the_second_forward():
    one = build()
    cache = PolicyCache(small("snapkv").compile(one), one.config)
    with torch.no_grad():
        one(prompt(4)[0], past_key_values=cache)
        with pytest.raises(CacheError, match="attention"):
            one(prompt(4)[0], past_key_values=cache)


def test_a_compressed_cache_does_not_pose_as_plain_keys_and_values():
    with small("snapkv").attach(model()) as attachment, pytest.raises(TypeError, match="managed"):
        list(attachment.cache())
