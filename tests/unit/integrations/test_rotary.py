"""The rotation that is read from a model is the one that it applies."""

import copy

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, GPT2Config, GPT2LMHeadModel

from kvpolicy.integrations.transformers.models.rotary import rotary_of, rotary_of_config
from tests.support.models import ARCHITECTURES, VOCABULARY, build, model, prompt


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_that_are_unrotated_depend_on_the_token_alone(architecture):
    """In the first layer a key before rotation follows from its token: the same token everywhere, the same key."""
    one = model(architecture)
    rotary, tokens = rotary_of(one), prompt(1)[0].expand(1, 30)
    layer = 0
    kept = one(tokens, use_cache=True).past_key_values.layers[layer].keys
    if architecture == "gemma3":  # whose first layer has a rotation of its own; see the test below
        return
    plain = rotary.unrotate(kept, torch.arange(30).expand(1, 2, 30))
    assert torch.allclose(plain, plain[:, :, :1].expand_as(plain), atol=1e-4)
    assert not torch.allclose(kept, kept[:, :, :1].expand_as(kept), atol=1e-2)


def test_of_several_rotations_it_is_that_of_the_layers_with_full_attention():
    one = model("gemma3")
    assert torch.equal(rotary_of(one).frequencies, one.model.rotary_emb.full_attention_inv_freq)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_configuration_is_enough(architecture):
    one = model(architecture)
    found = rotary_of_config(one.config)
    assert torch.equal(found.frequencies, rotary_of(one).frequencies)
    assert found.scaling == rotary_of(one).scaling


def test_scaled_rotations_are_followed_and_those_that_change_with_the_length_are_not():
    for kind, known in (("yarn", True), ("linear", True), ("dynamic", False)):
        rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
        one = build(rope_parameters=rope)
        assert (rotary_of(one) is not None) == known
        assert (rotary_of_config(copy.deepcopy(one.config)) is not None) == known


def test_models_that_rotate_otherwise_or_not_at_all_have_none():
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    pads = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    interleaved = CohereForCausalLM(CohereConfig(**shape, **pads, intermediate_size=32))
    assert rotary_of(interleaved) is None
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, **pads))
    assert rotary_of(learned) is None
    assert rotary_of_config(learned.config) is None
