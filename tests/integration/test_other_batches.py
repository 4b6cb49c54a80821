"""A cache that meets another batch, or that was retired, refuses before anything has changed."""

import copy

import pytest
import torch

import kvpolicy
from kvpolicy.errors import CacheError
from tests.support.interrupts import forward
from tests.support.models import generate, model, prompt
from tests.support.policies import small

POLICIES = {
    "full": lambda: kvpolicy.load("full"),
    "snapkv": lambda: small("snapkv"),
    "adakv": lambda: small("adakv"),  # heads differ, so that segments are met one by one
    "kivi": lambda: kvpolicy.load("kivi4", store={"use": "kivi", "bits": 4, "group": 4, "residual": 4, "batch": 4}),
}
TOKENS = prompt(30, 30, 30, 30)[0]
MORE = prompt(6, 6, 6, 6, seed=1)[0]


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_forward_of_other_rows_is_refused_and_leaves_the_cache_as_it_was(policy, architecture, rows):
    one = model(architecture)
    with policy().attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        forward(one, cache, TOKENS)
        expected = forward(one, copy.deepcopy(cache), MORE)
        others = MORE[:1].repeat(rows, 1)
        for count in (6, 1):
            with pytest.raises(CacheError, match=f"holds 4 rows, the forward has {rows}"):
                one(others[:, :count], past_key_values=cache)
        with pytest.raises(CacheError, match="holds 4 rows"):
            generate(one, torch.cat([TOKENS[:1].repeat(rows, 1), others], 1), past_key_values=cache)
        assert torch.equal(forward(one, cache, MORE), expected)


def test_each_layer_refuses_other_rows_by_itself():
    """Keys and values alike, layers with a sliding window too."""
    with small("snapkv").attach(model("gemma3")) as attachment:
        cache = attachment.cache()
        forward(model("gemma3"), cache, TOKENS)
        four, one = torch.zeros(4, 2, 1, 8), torch.zeros(1, 2, 1, 8)
        for layer in range(3):
            for keys, values in ((one, one), (four, one), (one, four)):
                with pytest.raises(CacheError, match=f"layer {layer}: the cache holds 4 rows"):
                    cache.update(keys, values, layer)
        assert [layer.get_seq_length() for layer in cache.layers] == [30] * 3


@pytest.mark.parametrize("masked", [False, True])
def test_steps_of_fixed_shapes_refuse_other_rows(steps, masked):
    one = model()
    with small("h2o").attach(one, graph=True) as attachment, torch.no_grad():
        cache, other = attachment.cache(), attachment.cache()
        for tokens in (TOKENS, *[TOKENS[:, :1]] * 4):
            forward(one, cache, tokens)
            forward(one, other, tokens)
        forward(one, other, MORE[:, :1])
        expected = forward(one, other, MORE[:, 1:2])
        served = len(steps)
        forward(one, cache, MORE[:, :1])
        mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long) if masked else None
        with pytest.raises(CacheError, match="holds 4 rows, the forward has 1"):
            one(MORE[:1, :1], attention_mask=mask, past_key_values=cache)
        assert torch.allclose(forward(one, cache, MORE[:, 1:2]), expected, atol=1e-4)
        assert served


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_a_mask_of_other_rows_is_refused_before_any_layer_has_taken_tokens(name):
    one = model()
    with small(name).attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        forward(one, cache, TOKENS)
        expected = forward(one, copy.deepcopy(cache), MORE)
        for rows in (1, 2, 5):
            mask = torch.ones(rows, 36, dtype=torch.long)
            assert torch.equal(forward(one, copy.deepcopy(cache), MORE, mask), expected)  # it hides nothing
            mask[:, 30:32] = 0
            with pytest.raises(CacheError, match=f"mask is of {rows} rows, the forward of 4"):
                forward(one, cache, MORE, mask)
        assert torch.equal(forward(one, cache, MORE), expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_rows_that_are_not_held_cannot_be_chosen(architecture):
    one = model(architecture)
    with small("adakv").attach(one) as attachment:
        cache = attachment.cache()
        forward(one, cache, TOKENS)
        expected = forward(one, copy.deepcopy(cache), MORE)
        for change in (
            lambda: cache.reorder_cache(torch.tensor([0, 1, 2, 4])),
            lambda: cache.reorder_cache(torch.tensor([0, 1, 2, -1])),
            lambda: cache.batch_select_indices(torch.tensor([7])),
            lambda: cache.batch_select_indices(torch.tensor([True] * 5)),
            lambda: cache.batch_repeat_interleave(0),
            lambda: cache.managed[0].select_rows([4]),
        ):
            with pytest.raises(CacheError, match="holds 4 rows"):
                change()
        assert torch.equal(forward(one, cache, MORE), expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_rows_that_were_moved_go_on_as_if_they_had_come_so(architecture):
    """Stock layers move with the others."""
    one = model(architecture)
    tokens, more = prompt(30, 30, seed=2)[0], prompt(5, 5, seed=3)[0]
    with small("snapkv").attach(one) as attachment:
        moved, cache = attachment.cache(), attachment.cache()
        forward(one, moved, tokens)
        moved.batch_repeat_interleave(2)
        moved.reorder_cache(torch.tensor([3, 0, 1, 2]))
        moved.batch_select_indices(torch.tensor([0, 3]))
        forward(one, cache, tokens[[1, 1]])
        moved.crop(0)
        assert torch.allclose(forward(one, moved, more), forward(one, cache, more), atol=1e-5)


def test_what_a_sliding_window_has_dropped_cannot_be_undone():
    """A window that has moved on is refused in our words, before the other layers have undone anything."""
    one = model("gemma3")
    with kvpolicy.load("full").attach(one) as attachment:
        cache = attachment.cache()
        forward(one, cache, TOKENS)
        expected = forward(one, copy.deepcopy(cache), MORE)
        for count in (-2, 28):
            with pytest.raises(CacheError, match="layer 0: cannot undo 2 tokens"):
                cache.crop(count)
        cache.crop(0)
        assert torch.equal(forward(one, cache, MORE), expected)
        short = attachment.cache()
        forward(one, short, TOKENS[:, :10])
        forward(one, short, MORE[:, :3])
        short.crop(10)
        assert torch.allclose(forward(one, short, TOKENS[:, 10:14]), attended(one, TOKENS[:, :14])[:, 10:], atol=1e-4)


def attended(one, tokens):
    with torch.no_grad():
        return one(tokens, use_cache=False).logits


@pytest.mark.parametrize("graph", [False, True])
def test_a_retired_cache_refuses_every_change_and_can_still_be_read(graph):
    one = model()
    with small("h2o").attach(one, graph=graph) as attachment, torch.no_grad():
        cache, other = attachment.cache(), attachment.cache()
        for tokens in (TOKENS, *[TOKENS[:, :1]] * 3):
            forward(one, cache, tokens)
        keys = torch.zeros(4, 2, 1, 8)
        cache.retire("the policy was detached")
        for change in (
            cache.begin_forward,
            lambda: one(TOKENS[:, :1], past_key_values=cache),
            lambda: cache.update(keys, keys, 0),
            lambda: cache.managed[1].update(keys, keys),
            lambda: cache.crop(-1),
            lambda: cache.managed[1].crop(-1),
            lambda: cache.reorder_cache(torch.arange(4)),
            lambda: cache.batch_repeat_interleave(2),
            lambda: cache.batch_select_indices(torch.tensor([0])),
            cache.activate_past_recording,
            cache.stop_recording,
            cache.reset,
        ):
            with pytest.raises(CacheError, match="the policy was detached"):
                change()
        assert cache.get_seq_length() == copy.deepcopy(cache).get_seq_length() == 33
        cache.check_integrity()
        with pytest.raises(CacheError, match="the policy was detached"):
            copy.deepcopy(cache).crop(-1)
        forward(one, other, TOKENS)  # the others go on
