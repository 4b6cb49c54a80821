"""What is read from a configuration."""

import pytest
from transformers import BartConfig, GPT2Config, LlamaConfig, MistralConfig

from kvpolicy.errors import UnsupportedModelError
from kvpolicy.integrations.transformers.models.support import geometry_of, layer_count
from kvpolicy.stages import Geometry
from tests.support.models import model


def test_the_geometry_is_that_of_the_decoder():
    assert geometry_of(model().config) == Geometry((0, 1, 2), 4, 2, 8)


def test_only_layers_with_full_attention_are_managed():
    assert geometry_of(model("gemma3").config).managed == (1, 2)
    assert layer_count(model("gemma3").config) == 3


def test_layers_of_an_encoder_are_not_counted():
    """The decoder alone of such a model, as it can be loaded."""
    config = BartConfig(decoder_layers=2, encoder_layers=5, is_encoder_decoder=False, is_decoder=True)
    assert geometry_of(config).managed == (0, 1)
    assert layer_count(config) == 2


def test_what_a_configuration_leaves_out_is_derived():
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
    assert geometry_of(config) == Geometry((0,), 4, 4, 8)
    assert geometry_of(GPT2Config(n_embd=32, n_head=4, n_layer=2)) == Geometry((0, 1), 4, 4, 8)


def test_every_reason_is_named():
    config = MistralConfig(sliding_window=16, num_hidden_layers=2)
    config.attn_logit_softcapping = 30.0
    with pytest.raises(UnsupportedModelError, match=r"mistral cannot carry a policy: .*soft-capped; no layer has full"):
        geometry_of(config)
