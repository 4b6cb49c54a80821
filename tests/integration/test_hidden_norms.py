"""How long the hidden states of a pass are: what a scorer is shown, in which models, and what is left of the hooks."""

import copy
import threading

import attrs
import pytest
import torch

from kvpolicy.errors import CacheError, PolicyError, UnsupportedModelError
from kvpolicy_plugins.scorers.attention_based.reconstruction import Reconstruction
from tests.support import fingerprint
from tests.support.alone import assert_rows_alone
from tests.support.models import ARCHITECTURES, build, generate, prompt
from tests.support.other_models import OTHERS, made
from tests.support.policies import held, small
from tests.support.rereading import Reread, forwards, read, rereading

TOKENS, _ = prompt(30)
INPUTS = ("q_proj", "qkv_proj", "c_attn", "query_key_value")  # the layers that read what attention is given


def weighed(**overrides):
    """A small policy of KVzip+: passes of at most 5 + 2 tokens."""
    return rereading(scorer=Reconstruction(5, 2, "output_norm"), **overrides)


@attrs.frozen
class Shown(Reread):
    """Writes down the norms that it is shown."""

    name = "shown"

    seen: list = attrs.field(factory=list, eq=False)

    def needs(self):
        return attrs.evolve(super().needs(), hidden_norms=True)

    def observe_pass(self, query_logits, state):
        assert query_logits.output_norms is None  # it has not asked for them
        self.seen.append(query_logits.hidden_norms)
        return super().observe_pass(query_logits, state)


def watch(one):
    """By layer, the lengths of all inputs of the linear layer that makes queries, a forward after the other."""
    seen = {}
    for module in one.modules():
        index = getattr(module, "layer_idx", None)
        for name, child in module.named_children():
            if index is not None and name in INPUTS:
                notes = seen.setdefault(index, [])
                child.register_forward_hook(
                    lambda _module, given, _out, notes=notes: notes.append(given[0].double().square().sum(-1).sqrt())
                )
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_a_scorer_is_shown_how_long_what_attention_is_given_is(name, dtype):
    """In each managed layer, in float32; GPT-2 is given it by place, and not by name."""
    one = made(name).to(dtype)
    scorer, tokens = Shown(5), prompt(30, 22)[0]
    with rereading(scorer=scorer).attach(one) as attachment:
        cache = attachment.cache()
        watched = watch(one)
        read(one, cache, tokens)
        layers = [layer.stats.layer for layer in cache.managed]
    assert len(scorer.seen) == 6 * len(layers)  # a pass after the other, and in each of them a layer after the other
    for number, found in enumerate(scorer.seen):
        expected = watched[layers[number % len(layers)]][1 + number // len(layers)]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_every_row_gives_what_it_gives_alone():
    tokens, mask = prompt(33, 21, 9)
    one = build()
    with weighed().attach(one) as attachment:
        decisions = assert_rows_alone(one, attachment, tokens, mask)
    assert decisions.repeated


def test_a_forward_of_another_thread_is_none_of_its_business():
    """One that runs when the hidden states of a layer have been seen, and its attention has not been called yet."""
    one, layer = build(), 1
    with weighed().attach(one) as attachment:
        expected = attachment.cache()
        read(one, expected, TOKENS)
        running, others = threading.Lock(), []

        def meanwhile(*_):
            if running.acquire(blocking=False):
                others.append(threading.Thread(target=lambda: one.model(TOKENS[:, 7:12], use_cache=False)))
                others[-1].start()
                others[-1].join()
                running.release()

        one.model.layers[layer].self_attn.q_proj.register_forward_hook(meanwhile)
        cache = attachment.cache()
        read(one, cache, TOKENS)
    assert len(others) == 7
    assert held(cache) == held(expected)
    for layer in range(3):
        name = "score[0].most"
        assert torch.equal(*(each.managed[layer].storage.slots.tensors[name] for each in (cache, expected)))


@pytest.mark.parametrize("part", ["self_attn", "layer"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_parts_of_the_model_may_be_compiled(part, when):
    one, plain = build(), build()

    def compiled():
        for layer in one.model.layers:
            (layer if part == "layer" else layer.self_attn).compile(backend="eager")

    if when == "before":
        compiled()
    with weighed().attach(one) as attachment, weighed().attach(plain) as alone:
        if when == "after":
            compiled()
        caches = attachment.cache(), alone.cache()
        for _ in range(2):
            for model, cache in zip((one, plain), caches, strict=True):
                read(model, cache, TOKENS)
        assert held(caches[0]) == held(caches[1])


@pytest.mark.parametrize("fails", [False, True])
def test_the_hooks_are_gone_afterwards(fails):
    one = build()
    with weighed().attach(one) as attachment:
        before, calls = fingerprint.of_model(one), []

        def fail(*_):
            calls.append(None)
            if fails and len(calls) == 3:
                raise KeyboardInterrupt

        handle = one.model.layers[1].mlp.register_forward_pre_hook(fail)
        if fails:
            with pytest.raises(KeyboardInterrupt):
                read(one, attachment.cache(), TOKENS)
        else:
            read(one, attachment.cache(), TOKENS)
        handle.remove()
        assert fingerprint.of_model(one) == before


def test_nobody_is_watched_for_a_scorer_that_does_not_ask():
    one, hooks = build(), []
    with rereading().attach(one) as attachment:
        attention = one.model.layers[0].self_attn
        one.model.norm.register_forward_hook(lambda *_: hooks.append(len(attention._forward_pre_hooks)))
        read(one, attachment.cache(), TOKENS)
    assert hooks == [0] * 7


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_steps_of_fixed_shapes_go_on_from_it(architecture):
    given = prompt(20, 14)
    results = []
    for graph in (False, True):
        one = build(architecture)
        with weighed().attach(one, graph=graph):
            results.append(generate(one, *given, count=12).sequences)
    assert torch.equal(*results)


def test_copied_models_and_caches_go_on():
    one = build()
    with weighed().attach(one) as attachment:
        cache = attachment.cache()
        read(one, cache, TOKENS[:, :8])
        other = copy.deepcopy(one)
        caches = cache.fork(), copy.deepcopy(cache)
        expected = attachment.cache()
        read(one, expected, TOKENS[:, :8])
        for each in (expected, *caches):
            read(one, each, TOKENS)
        assert [held(each) for each in caches] == [held(expected)] * 2
        assert torch.equal(generate(other, TOKENS).sequences, generate(one, TOKENS).sequences)


# -- what is refused -------------------------------------------------------------------------------------------


def renamed(one):
    """The attention of the first layer takes what it is given by another name."""
    attention = one.transformer.h[0].attn
    forward = attention.forward

    def other(states, past_key_values=None, attention_mask=None, **call):
        return forward(states, past_key_values=past_key_values, attention_mask=attention_mask, **call)

    attention.forward = other
    return one


def test_a_model_whose_attention_takes_none_is_refused_by_the_key():
    one = renamed(made("gpt2"))
    message = r"score\[0\]: shown needs the hidden states .* are not known: layer 0: GPT2Attention is given no hidden"
    for refused in (rereading(scorer=Shown()).compile, rereading(scorer=Shown()).attach):
        with pytest.raises(PolicyError, match=message):
            refused(one)
    rereading().attach(one).detach()


def test_the_module_that_attends_is_looked_at_when_attaching():
    """Another one may have the index of a layer."""
    one = renamed(made("gpt2"))
    one.beside = copy.deepcopy(made("gpt2").transformer.h[0].attn)
    rereading(scorer=Shown()).compile(one)
    with pytest.raises(PolicyError, match=r"score\[0\]: shown needs the hidden states .* layer 0: GPT2Attention is"):
        rereading(scorer=Shown()).attach(one)


def test_both_that_are_missing_are_told():
    one = renamed(made("gpt2"))
    one.transformer.h[1].attn.c_proj = torch.nn.Sequential(one.transformer.h[1].attn.c_proj)
    with pytest.raises(PolicyError) as caught:
        weighed().compile(one)
    assert [problem.where for problem in caught.value.problems] == ["score[0]", "score[0]"]
    assert "output projection" in str(caught.value)
    assert "hidden states" in str(caught.value)


def not_run():
    """A model that no guard has looked at."""
    one = build()
    one.activation_checkpointing_enable()
    return one.train()


def test_a_model_that_could_not_be_run_is_refused():
    with pytest.raises(PolicyError, match=r"score\[0\]: shown needs the hidden .*: the model could not be run before"):
        rereading(scorer=Shown()).attach(not_run())


def test_a_cache_on_a_model_whose_attention_is_not_known_is_refused_by_its_first_pass():
    """It was attached with another policy, which asks for nothing."""
    one = not_run()
    with small("snapkv").attach(one):
        cache = rereading(scorer=Shown()).cache(one)
        one.activation_checkpointing_disable()
        one.eval()
        with pytest.raises(CacheError, match="layer 0: the hidden states of a pass could not be seen"):
            read(one, cache, TOKENS)


def test_hidden_states_of_another_shape_are_refused():
    """A module that is given something else only when a prompt is read again."""
    one = build()
    with rereading(scorer=Shown()).attach(one) as attachment:
        cache, seen = attachment.cache(), forwards(one)[0]

        def flat(_module, args, call):
            states = call["hidden_states"]
            return args, {**call, "hidden_states": states[None] if len(seen) > 1 else states}

        one.model.layers[1].self_attn.register_forward_pre_hook(flat, with_kwargs=True)
        with pytest.raises(
            UnsupportedModelError, match=r"LlamaAttention is given hidden_states \[1, 1, 5, 32\], expec"
        ):
            read(one, cache, TOKENS)
        with pytest.raises(CacheError, match="failed"):
            read(one, cache, TOKENS)
