"""The forward of a model with steps of fixed shapes: what it serves, leaves to the model, and gives back."""

import copy
import itertools

import pytest
import torch

from tests.integration.static_steps import TOLERANCE, fed
from tests.support import fingerprint
from tests.support.decisions import Decisions
from tests.support.models import build, generate, model, prompt
from tests.support.policies import small


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["beams", "lookup"])
def test_decoding_that_moves_or_undoes_goes_on_as_ever(options, steps):
    tokens, mask = prompt(40)
    found = []
    for graph in (False, True):
        with small("snapkv").attach(model(), graph=graph):
            found.append(generate(model(), tokens, mask, output_logits=False, **options).sequences)
    assert torch.equal(*found)
    assert not steps


def test_tokens_may_be_given_by_place_and_without_a_mask(steps):
    one, tokens = model(), prompt(30)[0]
    with small("rkv").attach(one, graph=True) as attachment, torch.no_grad():
        cache = attachment.cache()
        for begin, end in itertools.pairwise([0, 20, *range(21, 26)]):
            output = one(tokens[:, begin:end], None, None, cache)
    assert len(steps) == 4
    assert output.past_key_values is cache
    assert cache.get_seq_length() == 25


@pytest.mark.parametrize(
    "more",
    [{"output_hidden_states": True}, {"use_cache": False}, {"return_dict": False}],
    ids=lambda more: next(iter(more)),
)
def test_what_gives_more_than_logits_is_left_to_the_model(more, steps):
    one, tokens = model(), prompt(30)[0]
    with small("rkv").attach(one, graph=True) as attachment, torch.no_grad():
        cache = attachment.cache()
        fed(one, cache, tokens, 20, 21, 22)
        assert len(steps) == 1
        one(tokens[:, 22:23], past_key_values=cache, **more)
        assert len(steps) == 1
        fed(one, cache, tokens, 24, 25, 26)
    assert len(steps) == 1 + 2


def test_gradients_are_left_to_the_model(steps):
    one, tokens = build(), prompt(30)[0]
    with small("rkv").attach(one, graph=True) as attachment:
        cache = attachment.cache()
        fed(one, cache, tokens, 20, 21)
        assert one(tokens[:, 21:22], past_key_values=cache).logits.requires_grad
    assert not steps


def test_a_pad_among_decoded_tokens_is_left_to_the_model(steps):
    found, decisions = [], Decisions()
    tokens, mask = prompt(30, 30)[0], torch.ones(2, 30, dtype=torch.long)
    mask[1, 26] = 0
    for graph, mode in ((False, decisions.watched), (True, decisions.followed)):
        with small("rkv").attach(model(), graph=graph) as attachment, mode(), torch.no_grad():
            cache = attachment.cache()
            found.append(
                [
                    model()(tokens[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits[:, -1]
                    for begin, end in itertools.pairwise([0, 20, *range(21, 31)])
                ]
            )
    assert len(steps) == 5 + 3  # before the pad and after it
    assert (torch.stack(found[0]) - torch.stack(found[1])).abs().max() <= TOLERANCE


def test_a_detached_model_is_as_it_was(steps):
    one = build()
    before = fingerprint.of_model(one)
    with small("snapkv").attach(one, graph=True):
        assert fingerprint.of_model(one) != before
        generate(one, *prompt(30, 20))
    assert fingerprint.of_model(one) == before
    assert steps


def test_the_forward_that_somebody_else_had_put_there_is_used_and_comes_back(steps):
    one, calls = build(), []
    own = one.forward

    def forward(*args, **call):
        calls.append(1)
        return own(*args, **call)

    one.forward = forward
    with small("snapkv").attach(one, graph=True):
        calls.clear()  # those of the guard
        output = generate(one, *prompt(30, 20))
    assert one.forward is forward
    assert len(calls) == 24
    assert len(steps) == 22
    assert output.sequences.shape == (2, 54)


def test_a_copy_of_an_attached_model_serves_its_own_steps(steps):
    one = build()
    with small("snapkv").attach(one, graph=True):
        expected = generate(one, *prompt(30, 20))
        other = copy.deepcopy(one)
    found = generate(other, *prompt(30, 20))
    assert torch.equal(expected.sequences, found.sequences)
    assert len({id(session) for session in steps}) == 2
    assert steps[-1]._step.forward.__self__ is other
