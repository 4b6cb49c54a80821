"""The weight that follows attention: which it is in a model, that it is read live, and what is refused without it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig

from kvpolicy.errors import CacheError, PolicyError, UnsupportedModelError
from kvpolicy.integrations.transformers.models.output_projection import weight_of
from kvpolicy.integrations.transformers.models.support import geometry_of
from tests.support.models import ARCHITECTURES, VOCABULARY, build, generate, model, prompt
from tests.support.other_models import OTHERS, made
from tests.support.policies import held, small


class Watched:
    """What attention modules call attention, and the inputs and outputs of linear layers behind it, by layer."""

    def __init__(self, one, names=("o_proj", "out_proj", "c_proj", "dense")):
        self.seen = {}
        for module in one.modules():
            index = getattr(module, "layer_idx", None)
            for name, child in module.named_children():
                if index is not None and name in names:
                    child.register_forward_hook(lambda layer, given, out, index=index: self.note(index, given, out))

    def note(self, index, given, out):
        self.seen[index] = given[0].detach(), out.detach()


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_each_managed_layer_shows_the_weight_that_its_own_attention_is_multiplied_with(name):
    """Also where layers with a sliding window are not managed: ordinals are not indices."""
    one = made(name)
    watched = Watched(one)
    with small("criticalkv").attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        attachment.model(prompt(20)[0], past_key_values=cache)
        assert len(cache.managed) == len(cache.plan.geometry.managed)
        for layer in cache.managed:
            shown = layer.view([0]).projection
            given, out = watched.seen[layer.stats.layer]
            heads, dim, channels = shown.shape
            assert (heads, dim) == (cache.plan.geometry.query_heads, cache.plan.geometry.head_dim)
            plain = given.unflatten(-1, (heads, dim))
            found = torch.einsum("bthd,hdc->btc", plain, shown)
            bias = (out - found).mean((0, 1))  # one number a channel
            torch.testing.assert_close(found + bias, out, atol=1e-5, rtol=1e-4)
            assert out.shape[-1] == channels


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_a_configuration_tells_whether_it_is_known(name):
    small("criticalkv").check(made(name).config)
    assert small("criticalkv").compile(made(name).config).needs.output_projection


def test_the_weight_is_read_when_it_is_needed():
    """And not copied: an adapter that is merged in the meantime counts."""
    one = build()
    with small("criticalkv").attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        attachment.model(prompt(20)[0], past_key_values=cache)
        layer = cache.managed[1]
        weight = one.model.layers[1].self_attn.o_proj.weight
        assert layer.view([0]).projection.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        weight.mul_(3.0)
        torch.testing.assert_close(layer.view([0]).projection[2, 3], weight[:, 2 * 8 + 3])
        one.model.layers[1].self_attn.o_proj = nn.Linear(32, 32)
        replaced = one.model.layers[1].self_attn.o_proj.weight
        torch.testing.assert_close(layer.view([0]).projection[2, 3], replaced[:, 2 * 8 + 3])


class Wrapped(nn.Module):
    """As adapters are around a layer."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, given):
        return self.base_layer(given)


def test_an_adapter_is_looked_into():
    one = build()
    attention = one.model.layers[0].self_attn
    expected = attention.o_proj.weight.detach().T.unflatten(0, (4, 8))
    attention.o_proj = Wrapped(attention.o_proj)
    assert torch.equal(weight_of(attention, geometry_of(one.config)), expected)


def changed(change):
    one = build()
    attention = one.model.layers[1].self_attn
    change(attention)
    return one


def quantised(attention):
    weight = attention.o_proj.weight.detach().mul(10).to(torch.int8)
    attention.o_proj.weight = nn.Parameter(weight, requires_grad=False)


def float8(attention):
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight.detach().to(torch.float8_e4m3fn))


def packed(attention):
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight.detach().reshape(-1, 1))


def inside(attention):
    attention.o_proj = nn.Sequential(attention.o_proj)


def doubled(attention):
    attention.out_proj = copy.deepcopy(attention.o_proj)


def offloaded(attention):
    attention.o_proj.to("meta")


WRONG = {
    quantised: "quantised or sharded",
    float8: "quantised or sharded",
    packed: "quantised or sharded",
    inside: "LlamaAttention has 0 layers from 32 numbers that are called one of o_proj",
    doubled: "LlamaAttention has 2 layers from 32 numbers",
    offloaded: "not on a device",
}


@pytest.mark.parametrize("change", WRONG)
def test_a_model_whose_projection_is_not_known_is_refused_by_the_key(change):
    one = changed(change)
    message = rf"select: critical needs the output projection .* is not known: layer 1: .*{WRONG[change]}"
    with pytest.raises(PolicyError, match=message):
        small("criticalkv").compile(one)
    with pytest.raises(PolicyError, match=message):
        small("criticaladakv").attach(one)
    small("snapkv").compile(one)


def test_a_configuration_without_it_is_refused():
    """The module that calls BERT's attention ends there; another one has the projection."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=VOCABULARY, **sizes, is_decoder=True)
    message = "select: critical needs the output projection .*: layer 0: BertSelfAttention has 0 layers from 32 numbers"
    for shown in (config, AutoModelForCausalLM.from_config(config)):
        with pytest.raises(PolicyError, match=message):
            small("criticalkv").compile(shown)
    small("snapkv").compile(config)


def test_a_layer_that_no_module_has_the_index_of_is_refused():
    one = build()
    one.model.layers[0].self_attn.layer_idx = None
    with pytest.raises(PolicyError, match=r"select: critical needs the output projection .*: layer 0: no module has"):
        small("criticalkv").compile(one)


def test_the_module_that_attends_is_looked_at_when_attaching():
    """Another one may have the index of a layer."""
    one = changed(inside)
    beside = copy.deepcopy(build().model.layers[1].self_attn)
    one.beside = beside
    small("criticalkv").compile(one)
    with pytest.raises(PolicyError, match=r"select: critical needs .* layer 1: LlamaAttention has 0 layers"):
        small("criticalkv").attach(one)


def test_a_model_that_could_not_be_run_is_refused():
    one = build()
    one.activation_checkpointing_enable()
    one.train()
    with pytest.raises(PolicyError, match=r"select: critical needs .*: the model could not be run before"):
        small("criticalkv").attach(one)


def test_an_attention_of_another_shape_is_not_read():
    with pytest.raises(UnsupportedModelError, match="has 0 layers from 32 numbers"):
        weight_of(build(hidden_size=64, head_dim=16).model.layers[0].self_attn, geometry_of(model().config))


def test_copies_forks_and_pickled_caches_go_on_and_hold_no_weights():
    one = build()
    tokens = prompt(40)[0]
    with small("criticalkv", 12, 4).attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        attachment.model(tokens[:, :20], past_key_values=cache)
        pickled = pickle.dumps(cache)
        others = [copy.deepcopy(cache), cache.fork(), pickle.loads(pickled)]  # noqa: S301
        assert len(pickled) < 4 * sum(parameter.numel() for parameter in one.parameters()) / 2
        with pytest.raises(CacheError, match="belongs to no attachment yet"):
            others[2].managed[0].view([0])
        for start in range(20, 40):
            for each in (cache, *others):
                attachment.model(tokens[:, start : start + 1], past_key_values=each)
        assert [held(other) for other in others] == [held(cache)] * 3


def test_a_saved_cache_goes_on(tmp_path):
    one, tokens = build(), prompt(40)[0]
    with small("criticaladakv", 12, 4).attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        attachment.model(tokens[:, :20], past_key_values=cache)
        cache.save(tmp_path / "prefix.safetensors")
        other = attachment.load_cache(tmp_path / "prefix.safetensors")
        for start in range(20, 40):
            for each in (cache, other):
                attachment.model(tokens[:, start : start + 1], past_key_values=each)
        assert held(other) == held(cache)


def test_a_copied_model_reads_its_own_weights():
    one = build()
    with small("criticalkv").attach(one), torch.no_grad():
        for duplicate in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):  # noqa: S301
            generate(duplicate, *prompt(20), count=3)
            weight = duplicate.model.layers[2].self_attn.o_proj.weight
            cache = duplicate.generate(
                prompt(20)[0], max_new_tokens=2, return_dict_in_generate=True, do_sample=False
            ).past_key_values
            shown = cache.managed[2].view([0]).projection
            assert shown.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def test_steps_of_fixed_shapes_read_it_too():
    one = build()
    given = prompt(20, 14)
    with small("criticalkv").attach(one):
        expected = generate(one, *given, count=16)
    with small("criticalkv").attach(one, graph=True) as attachment:
        found = generate(one, *given, count=16)
        assert attachment._decode._session is not None
    assert torch.equal(found.sequences, expected.sequences)
    assert held(found.past_key_values) == held(expected.past_key_values)
