"""What a compressed cache cannot carry is refused, before anything has changed."""

import pytest
import torch
import transformers
from torch import nn

from kvpolicy.errors import UnsupportedCallError, UnsupportedModelError
from tests.support import fingerprint
from tests.support.models import VOCABULARY, build, difference, generate, model, prompt
from tests.support.policies import held, small

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_TEXT = {"num_layers": 2, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 32, "vocab_size": VOCABULARY}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_SHARING = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}

UNSUPPORTED = {
    "encoder": ("T5", _TEXT, "encoder-decoder"),
    "state": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY}, "heads|linear|recurrent"),
    "soft cap": ("Gemma2", _SMALL, "soft-capped"),
    "learned sinks": ("GptOss", {**_SMALL, **_EXPERTS}, "sinks"),
    "shared keys": ("Gemma3n", {**_SMALL, **_SHARING}, "share"),
    "latent": ("DeepseekV2", {**_SMALL, **_LATENT, "first_k_dense_replace": 4, "n_routed_experts": 2}, "latent"),
    "sliding": ("Mistral", {**_SMALL, "sliding_window": 16}, "sliding window"),
    "linear": ("Qwen3Next", {**_SMALL, "num_experts": 2, "num_experts_per_tok": 1}, "linear attention"),
}
_CLASSES = {"T5": ("T5ForConditionalGeneration", "T5Config"), "Gemma3n": ("Gemma3nForCausalLM", "Gemma3nTextConfig")}


def made(kind, options):
    model_class, config_class = _CLASSES.get(kind, (f"{kind}ForCausalLM", f"{kind}Config"))
    config = getattr(transformers, config_class)(**options)
    with torch.device("meta"):  # the shape is enough to be refused
        return getattr(transformers, model_class)(config)


@pytest.mark.parametrize(("kind", "options", "why"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_a_model_that_cannot_carry_a_policy_is_refused(kind, options, why):
    one = made(kind, options)
    before = fingerprint.of_model(one)
    if kind != "GptOss":  # whose configuration does not show it
        with pytest.raises(UnsupportedModelError, match=why):
            small("snapkv").compile(one.config)
    one.to_empty(device="cpu")
    before = fingerprint.of_model(one)
    with pytest.raises(UnsupportedModelError, match=why):
        small("snapkv").attach(one)
    assert fingerprint.of_model(one) == before


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        one = build()
    with pytest.raises(UnsupportedModelError, match="no weights"):
        small("snapkv").attach(one)


@pytest.mark.parametrize("what", [nn.Linear(2, 2), build().model], ids=["module", "no head"])
def test_what_cannot_generate_is_refused(what):
    with pytest.raises(UnsupportedModelError, match="can generate"):
        small("snapkv").attach(what)


def test_a_model_that_bypasses_the_attention_interface_is_refused(monkeypatch):
    one = build()
    monkeypatch.setattr(type(one), "_can_set_attn_implementation", classmethod(lambda _cls: False))
    before = fingerprint.of_model(one)
    with pytest.raises(UnsupportedModelError, match="AttentionInterface"):
        small("snapkv").attach(one)
    assert fingerprint.of_model(one) == before


def own_mask(length, hidden):
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    mask[..., hidden] = False
    return mask


def test_a_mask_of_the_callers_own_is_honoured_until_something_would_be_evicted():
    tokens, _ = prompt(20)
    mask = own_mask(20, slice(3, 5))
    with torch.no_grad():
        plain = model()(tokens, attention_mask=mask).logits
        with small("snapkv", budget=64).attach(model()) as attachment:
            attached = model()(tokens, attention_mask=mask, past_key_values=attachment.cache()).logits
    assert torch.equal(plain, attached)


@pytest.mark.parametrize("budget", [12, 19])
def test_a_mask_of_the_callers_own_is_refused_when_something_would_be_evicted(budget):
    with small("snapkv", budget=budget).attach(model()) as attachment, torch.no_grad():
        cache = attachment.cache()
        with pytest.raises(UnsupportedCallError, match="mask"):
            model()(prompt(20)[0], attention_mask=own_mask(20, slice(3, 5)), past_key_values=cache)


def test_a_mask_of_the_callers_own_is_refused_after_an_eviction():
    with small("snapkv").attach(model()) as attachment, torch.no_grad():
        cache = attachment.cache()
        model()(prompt(20)[0], past_key_values=cache)
        mask = torch.ones(1, 1, 1, 21, dtype=torch.bool)
        with pytest.raises(UnsupportedCallError, match="mask"):
            model()(torch.tensor([[5]]), attention_mask=mask, past_key_values=cache)


def test_hiding_tokens_that_were_seen_is_refused_after_an_eviction():
    """Which of them are still held differs by layer and head, so a later mask cannot take them back."""
    with small("snapkv").attach(model()) as attachment, torch.no_grad():
        cache = attachment.cache()
        model()(prompt(20)[0], past_key_values=cache)
        mask = torch.ones(1, 21, dtype=torch.long)
        mask[0, :3] = 0
        with pytest.raises(UnsupportedCallError, match="hides"):
            model()(torch.tensor([[5]]), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize(
    ("name", "value"),
    [("softcap", 20.0), ("s_aux", torch.zeros(4)), ("is_causal", False), ("unheard_of", torch.ones(1, 1, 20, 20))],
)
def test_an_argument_that_changes_what_is_attended_is_refused(name, value):
    with small("snapkv").attach(model()) as attachment, pytest.raises(UnsupportedCallError, match=name):
        model()(prompt(20)[0], past_key_values=attachment.cache(), **{name: value})


@pytest.mark.parametrize(
    "call", [{"unheard_of": 1}, {"tokenizer": object()}, {"shift_labels": torch.zeros(1, 20, dtype=torch.long)}]
)
def test_an_argument_that_has_nothing_to_do_with_attention_is_not(call):
    tokens = prompt(20)[0]
    with small("snapkv").attach(model()) as attachment, torch.no_grad():
        plain = model()(tokens, past_key_values=attachment.cache()).logits
        assert torch.equal(model()(tokens, past_key_values=attachment.cache(), **call).logits, plain)


def test_until_something_would_be_evicted_every_argument_has_its_effect():
    tokens = prompt(20)[0]
    with torch.no_grad():
        plain = model()(tokens, is_causal=False).logits
        with small("snapkv", budget=64).attach(model()) as attachment:
            found = model()(tokens, is_causal=False, past_key_values=attachment.cache()).logits
    assert torch.equal(found, plain)


def test_packed_sequences_are_refused():
    """Position ids that start anew say that several texts stand in one row."""
    positions = torch.arange(10).repeat(1, 2)
    bounds = {"cu_seq_lens_q": torch.tensor([0, 10, 20]), "cu_seq_lens_k": torch.tensor([0, 10, 20])}
    with small("snapkv").attach(model()) as attachment, pytest.raises(UnsupportedCallError, match="cu_seq_lens"):
        model()(prompt(20)[0], position_ids=positions, past_key_values=attachment.cache(), **bounds)


def test_keys_of_another_shape_or_type_are_refused():
    one = build()
    with small("snapkv").attach(one) as attachment:
        cache = attachment.cache()
        keys = torch.zeros(1, 2, 3, 8)
        for wrong in (keys.half(), torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 4)):
            with pytest.raises(UnsupportedModelError, match="must be"):
                cache.update(wrong, wrong, 0)
        cache.update(keys, keys, 0)


def test_a_refused_call_leaves_the_model_usable():
    one = build()
    tokens = prompt(40)[0]
    with small("snapkv").attach(one) as attachment:
        expected = generate(one, tokens)
        with torch.no_grad(), pytest.raises(UnsupportedCallError):
            one(tokens, attention_mask=own_mask(40, slice(0, 2)), past_key_values=attachment.cache())
        cache = attachment.cache()
        assert difference(generate(one, tokens, past_key_values=cache), expected) == 0
        assert held(cache)
