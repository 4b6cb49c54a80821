"""A model keeps the attention implementation that it was loaded with, until entries are altered; and after."""

import pytest
import torch
import transformers
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import kvpolicy
from kvpolicy.errors import UnsupportedModelError
from tests.support import fingerprint
from tests.support.models import ARCHITECTURES, VOCABULARY, build, difference, generate, prompt
from tests.support.policies import small

BATCHES = {"alone": (40,), "padded": (40, 29)}


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_attention_stays_eager_bit_for_bit(architecture, lengths, dtype):
    model, given = build(architecture, dtype=dtype), prompt(*lengths)
    model.set_attn_implementation("eager")
    plain = generate(model, *given, count=6)
    with kvpolicy.load("full").attach(model):
        assert difference(generate(model, *given, count=6), plain) == 0
    with small("snapkv", budget=64).attach(model):
        assert difference(generate(model, *given, count=6), plain) == 0
    assert model.config._attn_implementation == "eager"


def decoder_without_sdpa():
    shape = {"d_model": 32, "decoder_attention_heads": 4, "encoder_attention_heads": 2, "decoder_ffn_dim": 32}
    layers = {"decoder_layers": 2, "encoder_layers": 3, "max_position_embeddings": 128, "init_std": 0.3}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    torch.manual_seed(0)
    config = transformers.BigBirdPegasusConfig(vocab_size=VOCABULARY, **shape, **layers, **special)
    return transformers.BigBirdPegasusForCausalLM(config).eval()


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_a_decoder_that_knows_no_other_implementation_sees_no_later_token(lengths):
    model, (tokens, mask) = decoder_without_sdpa(), prompt(*lengths)
    assert model.config._attn_implementation == "eager"
    plain = generate(model, tokens, mask, count=6)
    other = tokens.clone()
    other[:, -1] = 5
    with kvpolicy.load("full").attach(model) as attachment, torch.no_grad():
        assert attachment.plan.geometry.managed == (0, 1)
        assert attachment.plan.geometry.query_heads == 4
        assert difference(generate(model, tokens, mask, count=6), plain) == 0
        one, two = (
            model(given, attention_mask=mask, past_key_values=attachment.cache()).logits for given in (tokens, other)
        )
    real = mask[:, :-1].bool()  # what is computed for a pad means nothing
    assert torch.equal(one[:, :-1][real], two[:, :-1][real])


def test_after_an_eviction_eager_and_sdpa_agree():
    tokens, mask = prompt(40, 29)
    found = []
    for implementation in ("eager", "sdpa"):
        model = build()
        model.set_attn_implementation(implementation)
        with small("snapkv").attach(model) as attachment:
            found.append(generate(model, tokens, mask, count=12))
            assert attachment.report().layers[0].held <= 16
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert difference(*found) < 1e-4


def halved(module, query, *rest, **call):
    return sdpa_attention_forward(module, query, *rest, **call)[0] * 0.5, None


def test_an_implementation_of_the_users_own_is_called(monkeypatch):
    calls = []

    def own(*args, **call):
        calls.append(args[0])
        return sdpa_attention_forward(*args, **call)

    registries = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    for registry, function in zip(registries, (own, sdpa_mask), strict=True):
        monkeypatch.setitem(registry, "own", function)
        monkeypatch.setitem(registry, "kvpolicy_own", None)
        del registry["kvpolicy_own"]
    model, given = build(), prompt(20, 13)
    model.set_attn_implementation("own")
    plain = generate(model, *given, count=4)
    with kvpolicy.load("full").attach(model):
        calls.clear()
        assert difference(generate(model, *given, count=4), plain) == 0
        assert len(calls) == 4 * model.config.num_hidden_layers
    assert model.config._attn_implementation == "own"


def test_an_implementation_that_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "halved", halved)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "halved", sdpa_mask)
    model = build()
    model.set_attn_implementation("halved")
    with pytest.raises(UnsupportedModelError, match=r"layer 0.*softmax"):
        kvpolicy.load("full").attach(model)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "paged|eager", "kernels-community/flash-attn"])
def test_an_implementation_whose_masks_tell_nothing_is_refused(name):
    model = build()
    model.config._attn_implementation_internal = name
    before = fingerprint.of_model(model)
    with pytest.raises(UnsupportedModelError, match=r"attention implementation .*'sdpa'"):
        kvpolicy.load("full").attach(model)
    assert fingerprint.of_model(model) == before


def image_model():
    text = {"model_type": "qwen2", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.LlavaOnevisionConfig(
        text_config=text, vision_config=vision, image_token_id=90, video_token_id=91
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.mark.parametrize("vision", ["eager", "sdpa"])
@pytest.mark.parametrize("text", ["eager", "sdpa"])
def test_the_parts_of_a_model_keep_each_its_own(vision, text):
    model = image_model()
    model.set_attn_implementation({"vision_config": vision, "text_config": text})
    tokens = prompt(20)[0].clamp(max=80)
    plain = generate(model, tokens, count=4)
    names = [model.config.vision_config._attn_implementation, model.config.text_config._attn_implementation]
    with kvpolicy.load("full").attach(model):
        assert model.config.vision_config._attn_implementation == vision
        assert difference(generate(model, tokens, count=4), plain) == 0
    assert names == [vision, text]
    assert names == [model.config.vision_config._attn_implementation, model.config.text_config._attn_implementation]
