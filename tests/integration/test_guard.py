"""Before a policy is attached, the model is run on a few tokens; what does not use its cache as assumed is refused."""

import copy
import random

import pytest
import torch
import transformers
from torch import nn
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

import kvpolicy
from kvpolicy.errors import UnsupportedModelError
from kvpolicy.integrations.transformers.attachment import Attachment
from tests.support import fingerprint
from tests.support.models import VOCABULARY, build, difference, generate, prompt
from tests.support.policies import small

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_TWO_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "kv_channels": 8}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def made(kind, config):
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


def plain_git():
    shape = {name: value for name, value in _SMALL.items() if name != "num_key_value_heads"}
    config = transformers.GitConfig(**shape, vision_config={**_VISION, "image_size": 16, "patch_size": 8})
    return made("GitForCausalLM", config)


def image_layers():
    return made("MllamaForCausalLM", MllamaTextConfig(**_SMALL, cross_attention_layers=[1]))


REFUSED = {
    "two calls": (lambda: made("DiffLlamaForCausalLM", transformers.DiffLlamaConfig(**_SMALL)), "layer 0.*other keys"),
    "cross attention": (image_layers, "image|layer 1"),
    "experts": (lambda: made("JetMoeForCausalLM", transformers.JetMoeConfig(**_SMALL, **_TWO_EXPERTS)), "experts"),
    "own attention": (plain_git, "layer 0.*AttentionInterface"),
    "both directions": (lambda: made("BertLMHeadModel", transformers.BertConfig(**_SMALL)), "later tokens"),
}


@pytest.mark.parametrize(("make", "why"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("policy", ["full", "snapkv"])
def test_a_model_that_uses_its_cache_in_another_way_is_refused(make, why, policy):
    model = make()
    before, library = fingerprint.of_model(model), fingerprint.of_library()
    with pytest.raises(UnsupportedModelError, match=why):
        kvpolicy.load(policy).attach(model)
    assert fingerprint.of_model(model) == before
    assert fingerprint.of_library() == library


def llama_whose(forward):
    """A model whose second layer's attention does something else around the call of the first."""
    model = build()
    attention = model.model.layers[1].self_attn
    kind = type(attention)
    attention.__class__ = type(f"Other{kind.__name__}", (kind,), {"forward": forward})
    return model


def calls_twice(self, *args, **call):
    type(self).__mro__[1].forward(self, *args, **{**call, "past_key_values": None})
    return type(self).__mro__[1].forward(self, *args, **call)


def updates_twice(self, *args, **call):
    type(self).__mro__[1].forward(self, *args, **call)
    return type(self).__mro__[1].forward(self, *args, **call)


def never_updates(self, *args, **call):
    return type(self).__mro__[1].forward(self, *args, **{**call, "past_key_values": None})


def in_both_directions(self, *args, **call):
    count = args[0].shape[1] if args else call["hidden_states"].shape[1]
    call["attention_mask"] = torch.ones(1, 1, count, count, dtype=torch.bool) if count > 1 else None
    return type(self).__mro__[1].forward(self, *args, **call)


def fails_at_the_second(self, *args, **call):
    if call["past_key_values"].get_seq_length(0) > 5:
        raise RuntimeError("on purpose")
    return type(self).__mro__[1].forward(self, *args, **call)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (calls_twice, "layer 1 .*and with others"),
        (updates_twice, "layer 1 .*updated 2 times"),
        (never_updates, "layer 1 .*not updated"),
        (in_both_directions, "layer 1 .*softmax"),
        (fails_at_the_second, "RuntimeError: on purpose"),
    ],
)
def test_one_layer_is_enough_to_refuse_a_model(forward, why):
    model = llama_whose(forward)
    before = fingerprint.of_model(model)
    with pytest.raises(UnsupportedModelError, match=why) as raised:
        small("snapkv").attach(model)
    assert fingerprint.of_model(model) == before
    if forward is fails_at_the_second:
        assert isinstance(raised.value.__cause__, RuntimeError)


def test_keys_that_are_copied_before_attention_are_refused(monkeypatch):
    model = build()
    rotate = model.model.layers[0].self_attn
    original = type(rotate).forward.__globals__["ALL_ATTENTION_FUNCTIONS"].get_interface

    def copying(name, default):
        function = original(name, default)
        return lambda module, query, key, value, *rest, **call: function(
            module, query, key.clone(), value, *rest, **call
        )

    monkeypatch.setattr(type(rotate).forward.__globals__["ALL_ATTENTION_FUNCTIONS"], "get_interface", copying)
    with pytest.raises(UnsupportedModelError, match="layer 0"):
        small("snapkv").attach(model)


def everything(model):
    """Buffers, gradients and modes, beside the fingerprint."""
    return (
        fingerprint.of_model(model),
        {name: (id(buffer), buffer.clone()) for name, buffer in model.named_buffers()},
        [(module.training, vars(module).get("max_seq_len_cached")) for module in model.modules()],
        [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()],
    )


def same(one, other):
    buffers = zip(one[1].values(), other[1].values(), strict=True)
    return one[0] == other[0] and one[2:] == other[2:] and all(a[0] == b[0] and a[1].equal(b[1]) for a, b in buffers)


class Counting(nn.Module):
    """Keeps statistics in a buffer, in place, and draws random numbers, as layers do that are trained."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.last = None

    def forward(self, *args, **call):
        self.count += 1
        self.last = torch.rand(1) + random.random()  # noqa: S311
        return self.inner(*args, **call)


class Failing(nn.Module):
    def forward(self, _states):
        raise ZeroDivisionError


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_running_it_leaves_no_trace_in_the_model_or_in_random_numbers(training, fails):
    model = build(attention_dropout=0.5, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    model.model.layers[0].mlp = Counting(model.model.layers[0].mlp)
    model.train(training)
    model.model.norm.weight.requires_grad_(False)
    if fails:
        model.model.layers[2].mlp = Failing()
    before, states = everything(model), (torch.get_rng_state(), random.getstate())
    if fails:
        with pytest.raises(UnsupportedModelError, match="ZeroDivisionError"):
            Attachment(small("snapkv").compile(model), model)
    else:
        small("snapkv").attach(model).detach()
    assert same(everything(model), before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert model.model.layers[0].mlp.last is None


def test_hooks_of_others_do_not_see_it():
    model, seen = build(), []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append("after"))
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    with small("snapkv").attach(model):
        assert not seen
        generate(model, prompt(20)[0], count=1)
        assert seen == ["before", "after"]


def test_tokens_that_stand_for_something_else_are_not_used():
    model, given = build(), []
    model.config.image_token_id = VOCABULARY // 2
    model.config.audio_token_index = VOCABULARY // 2 + 1
    embed = model.model.embed_tokens
    kind = type(embed)

    def noted(self, tokens):
        given.extend(tokens.flatten().tolist())
        return kind.forward(self, tokens)

    embed.__class__ = type("Noted", (kind,), {"forward": noted})
    small("snapkv").attach(model).detach()
    assert given
    assert not {0, VOCABULARY // 2, VOCABULARY // 2 + 1} & set(given)
    assert max(given) < VOCABULARY


@pytest.mark.parametrize("how", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_runs_in_every_mode(how, dtype):
    model, tokens = build(dtype=dtype), prompt(20)[0]
    plain = generate(model, tokens, count=4)
    with how():
        attachment = kvpolicy.load("full").attach(model)
    assert attachment.unchecked is None
    assert difference(generate(model, tokens, count=4), plain) == 0
    assert all(not tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    attachment.detach()


def offloaded(model):
    """Weights wait on the host, and are placed for a forward: what accelerate's hooks do."""
    device, kept = torch.device("cpu"), {}

    class Hook:
        execution_device = device

    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        kept[module] = own
        module._hf_hook = Hook()

        def place(module, _args):
            for name, parameter in kept[module].items():
                module._parameters[name] = parameter

        def remove(module, _args, _output):
            for name, parameter in kept[module].items():
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

        remove(module, None, None)
        module.register_forward_pre_hook(place)
        module.register_forward_hook(remove)
    return model


def test_a_model_whose_weights_are_elsewhere_is_attached_unchecked(caplog):
    model, tokens = build(), prompt(30)[0]
    plain = generate(copy.deepcopy(model), tokens, count=4)
    model = offloaded(model)
    assert model.device.type == "meta"
    with kvpolicy.load("full").attach(model) as attachment:
        assert "offloaded" in attachment.unchecked
        assert difference(generate(model, tokens, count=4), plain) == 0
    assert [record.getMessage() for record in caplog.records if "was not run" in record.getMessage()]


def test_a_model_that_was_used_before_is_no_other_one():
    model = build()
    generate(model, prompt(20)[0], count=2)
    with small("snapkv").attach(model) as attachment:
        assert attachment.unchecked is None
