"""Whoever hands out a cache sees to it that it is the one in use; and caches go with their attachment."""

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
import transformers
from transformers import DynamicCache, Phi3Config, Phi3ForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from kvpolicy.errors import CacheError, UncompressedWarning
from tests.support.models import ARCHITECTURES, PAD, VOCABULARY, build, difference, generate, prompt
from tests.support.policies import small


@contextlib.contextmanager
def noted():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def said(caught):
    return [str(one.message) for one in caught if issubclass(one.category, UncompressedWarning)]


def own_loop(model, tokens, cache=None):
    """Three forwards, each with the cache that the one before gave back."""
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for start, end in ((0, 20), (20, 21), (21, 22)):
            output = model(tokens[:, start:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
    return said(caught), cache


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_loop_that_forgets_the_cache_is_told_once_and_counted(architecture):
    model = build(architecture)
    with small("snapkv").attach(model) as attachment:
        messages, cache = own_loop(model, prompt(22)[0])
        assert len(messages) == 1
        assert "does not bound" in messages[0]
        assert attachment.report().forwards_without_cache == 3
        assert "forwards without the policy's cache: 3" in str(attachment.report())
        assert attachment.report().to_dict()["forwards_without_cache"] == 3
    assert type(cache) is DynamicCache


def test_a_loop_with_the_cache_is_told_nothing():
    model = build()
    with small("snapkv").attach(model) as attachment:
        messages, cache = own_loop(model, prompt(22)[0], attachment.cache())
        assert not messages
        assert attachment.report().forwards_without_cache == 0
        assert "without" not in str(attachment.report())
        assert cache.managed[0].get_seq_length() == 22


def test_a_cache_given_by_place_and_an_output_without_names_are_understood():
    model, tokens = build(), prompt(20)[0]
    with small("snapkv").attach(model) as attachment, torch.no_grad():
        model(tokens, None, None, attachment.cache(), return_dict=False)
        assert attachment.report().forwards_without_cache == 0
        with pytest.warns(UncompressedWarning, match="does not bound"):
            model(tokens, None, None, DynamicCache(config=model.config), return_dict=False)
        assert attachment.report().forwards_without_cache == 1


def test_forwards_without_any_cache_are_nobodys_business():
    model = build()
    with small("snapkv").attach(model) as attachment, torch.no_grad():
        model(prompt(20)[0], use_cache=False)
        assert attachment.report().forwards_without_cache == 0


def test_a_model_that_drops_the_cache_on_its_way_is_found_out():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "sliding_window": None,
    }
    special = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    config = Phi3Config(**shape, **special, original_max_position_embeddings=24, rope_parameters=rope)
    model = Phi3ForCausalLM(config).eval()
    with small("snapkv").attach(model) as attachment, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(model, prompt(20)[0], count=30)
        assert len(said(caught)) == 1
        assert attachment.report().forwards_without_cache > 20


def test_a_decoder_that_makes_a_cache_of_its_own_is_found_out():
    shape = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
    shape |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_target_positions": 64}
    kind = {"is_decoder": True, "is_encoder_decoder": False, "pad_token_id": 0, "bos_token_id": 1}
    special = {"eos_token_id": None, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    config = transformers.WhisperConfig(vocab_size=VOCABULARY, **shape, **kind, **special)
    model = transformers.WhisperForCausalLM(config).eval()
    states = BaseModelOutput(last_hidden_state=torch.randn(1, 7, 32))
    with small("streaming_llm").attach(model) as attachment, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(model, prompt(20)[0], count=6, encoder_outputs=states)
        report = attachment.report()
        assert report.layers[0].seq_len == 25 or (len(said(caught)) == 1 and report.forwards_without_cache == 6)


def test_a_prefix_that_another_library_puts_into_a_cache_is_found_out():
    """As prefix tuning does: every forward gets a cache with learned keys and values in it."""
    model, tokens = build(), prompt(20)[0]
    prefix = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        prefix.update(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), layer)
    with small("snapkv").attach(model) as attachment, torch.no_grad(), noted() as caught:
        model(tokens, past_key_values=prefix, use_cache=True)
        model(tokens[:, :1], past_key_values=prefix)
        assert attachment.report().forwards_without_cache == 2
    assert len(said(caught)) == 1


@pytest.mark.parametrize("inner", [False, True])
def test_decoding_with_another_cache_is_seen_in_parts_of_the_model_too(inner):
    model, tokens = build("gemma3"), prompt(20)[0]
    cache = DynamicCache(config=model.config)
    part = model.model if inner else model
    with small("snapkv").attach(model), torch.no_grad(), noted() as caught:
        part(tokens, past_key_values=cache)
        part(tokens[:, :1], past_key_values=cache)
    assert len(said(caught)) == 1


# -- caches and attachments ------------------------------------------------------------------------------------


def filled(attachment, model, tokens):
    cache = attachment.cache()
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    return cache


COPIES = {"cache": lambda cache: cache, "copy": copy.deepcopy, "shallow copy": copy.copy}


@pytest.mark.parametrize("budget", [12, 64])
@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_a_cache_goes_no_further_than_its_attachment(how, budget):
    model, tokens = build(), prompt(20)[0]
    with small("snapkv", budget=budget).attach(model) as attachment:
        cache = how(filled(attachment, model, tokens))
    with torch.no_grad(), pytest.raises(CacheError, match="detached"):
        model(tokens[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 20
    with small("snapkv", budget=budget).attach(model), pytest.raises(CacheError, match=r"attachment|detached"):
        generate(model, tokens, count=1, past_key_values=cache)


def test_a_cache_of_another_policy_is_retired_as_well():
    model, tokens = build(), prompt(20)[0]
    with small("snapkv").attach(model), torch.no_grad():
        cache = small("streaming_llm").cache(model)
        model(tokens, past_key_values=cache)
    with torch.no_grad(), pytest.raises(CacheError, match="detached"):
        model(tokens[:, :1], past_key_values=cache)


def test_a_cache_of_another_model_is_refused_before_it_changes():
    policy, tokens = small("snapkv"), prompt(20)[0]
    one, other = build(seed=0), build(seed=1)
    with policy.attach(one) as first, policy.attach(other), torch.no_grad():
        cache = filled(first, one, tokens)
        expected = one(tokens[:, :1], past_key_values=copy.deepcopy(cache)).logits
        with pytest.raises(CacheError, match="another attachment"):
            other(tokens[:, :1], past_key_values=cache)
        assert torch.equal(one(tokens[:, :1], past_key_values=cache).logits, expected)


def test_a_copied_cache_goes_on_where_it_was_made():
    model, tokens = build(), prompt(20)[0]
    with small("snapkv").attach(model) as attachment, torch.no_grad():
        cache = filled(attachment, model, tokens)
        other = copy.deepcopy(cache)
        logits = [model(tokens[:, :1], past_key_values=one).logits for one in (cache, other)]
    assert torch.equal(*logits)


def test_a_cache_that_was_stored_belongs_to_the_attachment_that_uses_it_first():
    model, tokens = build(), prompt(20)[0]
    with small("snapkv").attach(model) as attachment, torch.no_grad():
        cache = filled(attachment, model, tokens)
        stored = pickle.dumps(cache)
        expected = model(tokens[:, :1], past_key_values=cache).logits
    cache = pickle.loads(stored)  # noqa: S301
    with small("snapkv").attach(model), torch.no_grad():
        assert torch.equal(model(tokens[:, :1], past_key_values=cache).logits, expected)
    with torch.no_grad(), pytest.raises(CacheError, match="detached"):
        model(tokens[:, :1], past_key_values=cache)


def test_a_policy_may_be_attached_again_and_makes_new_caches():
    model, tokens = build(), prompt(20)[0]
    found = []
    for _ in range(2):
        with small("snapkv").attach(model):
            found.append(generate(model, tokens, count=4))
    assert difference(*found) == 0
