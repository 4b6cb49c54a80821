"""`check` and `attach` agree about a model, wherever its configuration can tell."""

import contextlib

import pytest
import torch
import transformers

from kvpolicy.errors import KVPolicyError, UnsupportedModelError
from kvpolicy.integrations.transformers.models.attention_shape import is_set
from kvpolicy.integrations.transformers.models.support import geometry_of
from tests.support.models import ARCHITECTURES, VOCABULARY, build
from tests.support.policies import small

_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_MORE = {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}

REFUSED = {
    "learned sinks": ("GptOssForCausalLM", transformers.GptOssConfig, {**_EXPERTS, "head_dim": 8}),
    "two calls": ("DiffLlamaForCausalLM", transformers.DiffLlamaConfig, {}),
    "own attention": ("GitForCausalLM", transformers.GitConfig, {}),
    "no interface": ("BloomForCausalLM", transformers.BloomConfig, {}),
    "both directions": ("BertLMHeadModel", transformers.BertConfig, {}),
    "one direction, no interface": ("RoFormerForCausalLM", transformers.RoFormerConfig, {"is_decoder": True}),
}


@pytest.mark.parametrize(("kind", "config", "options"), REFUSED.values(), ids=REFUSED)
def test_what_attach_refuses_check_refuses(kind, config, options):
    model = getattr(transformers, kind)(config(**{**_SHAPE, **_MORE, **options})).eval()
    before = model.config.to_dict()
    messages = []
    for refuse in (lambda: small("snapkv").check(model.config), lambda: small("snapkv").attach(model)):
        with pytest.raises(UnsupportedModelError) as raised:
            refuse()
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert model.config.to_dict() == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_attach_takes_check_takes(architecture):
    model = build(architecture)
    state = torch.get_rng_state()
    small("snapkv").check(model.config)
    small("snapkv").attach(model).detach()
    assert torch.equal(torch.get_rng_state(), state)


def test_bert_as_a_decoder_is_taken_by_both():
    config = transformers.BertConfig(**{**_SHAPE, **_MORE}, is_decoder=True)
    small("snapkv").check(config)
    small("snapkv").attach(transformers.BertLMHeadModel(config).eval()).detach()


def llama(**options):
    return transformers.LlamaConfig(**{**_SHAPE, **_MORE, "num_key_value_heads": 2, **options})


@pytest.mark.parametrize("name", ["attn_logit_softcapping", "kv_sharing_modes", "num_kv_shared_layers", "kv_lora_rank"])
def test_a_list_in_which_nothing_is_set_sets_nothing(name):
    config = llama()
    for value in ([None, None], [0, 0], None):
        setattr(config, name, value)
        assert not is_set(config, name)
        assert geometry_of(config).layers == 2
    setattr(config, name, [None, 1])
    with pytest.raises(UnsupportedModelError):
        geometry_of(config)


def test_numbers_given_layer_by_layer_are_those_of_the_managed_layers():
    config = llama()
    values = vars(config)  # some classes check what is assigned, others do not
    values["num_key_value_heads"] = [2, 2]
    assert geometry_of(config).kv_heads == 2
    values["num_key_value_heads"] = [2, 4]
    with pytest.raises(UnsupportedModelError, match="differ in num_key_value_heads: 2, 4"):
        geometry_of(config)
    values["num_key_value_heads"] = ["two", "two"]
    with pytest.raises(UnsupportedModelError, match="must be an integer: 'two'"):
        geometry_of(config)


def test_a_layer_with_a_window_may_differ_from_those_without():
    config = build("gemma3").config
    vars(config)["head_dim"] = [4, 8, 8]
    assert geometry_of(config).head_dim == 8


def test_a_configuration_whose_values_are_guarded_is_read_layer_by_layer():
    """As transformers does for models whose layers differ: the one value cannot be read."""
    types = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    config = transformers.Gemma4TextConfig(num_hidden_layers=4, layer_types=types, num_kv_shared_layers=0)
    found = geometry_of(config)
    assert found.managed == (2, 3)
    assert found.head_dim == config.per_layer_config[2].head_dim


ODD = ("diffusion_gemma_text", "dots3_note_text", "embedding_gemma2_text", "gemma4_text", "gemma4_unified_assistant")
ODD += ("mistral_large4_text", "segformer", "swin", "zamba2", "musicgen", "vision-encoder-decoder", "gemma3n_text")


@pytest.mark.parametrize("name", ODD)
def test_an_unusual_configuration_gives_a_geometry_or_our_error(name):
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if name in known:  # not every version has them all
        try:
            config = known[name]()
        except Exception:  # noqa: BLE001 - not every one can be made without being told something
            return
        with contextlib.suppress(KVPolicyError):
            geometry_of(config)
