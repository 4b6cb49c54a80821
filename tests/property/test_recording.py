"""Tokens that may be undone give and leave what they would give and leave one by one, whatever policy holds them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.snapshots import held_by
from tests.property.test_packed_layers import STORES, entries, plan_of
from tests.support.driving import feed, new_layer
from tests.support.examples import examples

PAGES = {"use": "pages", "page": 4, "budget": 8, "dense_first": 0}
MERGES = ("drop", {"use": "d2o"}, {"use": "keepkv", "threshold": -1, "window": 3})
BUDGET, PROMPT = 12, 20


def alone(layer, tokens):
    """Outputs of decoding token by token, and copies of the layer behind each."""
    outputs, layers = [], [copied(layer)]
    for place in range(tokens[0].shape[2]):
        outputs.append(feed(layer, *(one[:, :, place : place + 1] for one in tokens)))
        layers.append(copied(layer))
    return torch.cat([torch.empty_like(outputs[0][:, :, :0]), *outputs], 2), layers


def copied(layer):
    return copy.deepcopy(layer, {id(layer.plan): layer.plan})


def assert_alike(layer, other):
    assert (layer.seq_len, layer.num_tokens, layer.compressed) == (other.seq_len, other.num_tokens, other.compressed)
    assert layer.stats.compressions == other.stats.compressions
    for rows in zip(held_by(layer), held_by(other), strict=True):
        for one, wanted in zip(*rows, strict=True):
            for name, column in one.items():
                assert torch.allclose(column, wanted[name], atol=1e-4), name
    for name, values in layer.row_state.items():
        assert torch.allclose(values, other.row_state[name], atol=1e-5)
    for found, wanted in zip(layer.window.last([0]), other.window.last([0]), strict=True):
        assert torch.allclose(found, wanted)


rounds = st.lists(st.tuples(st.lists(st.integers(1, 6), min_size=1, max_size=2), st.integers(0, 8)), max_size=4)


@given(
    store=st.sampled_from(sorted(STORES)),
    merge=st.sampled_from(MERGES),
    read=st.sampled_from(("all", PAGES)),
    ragged=st.booleans(),
    every=st.integers(1, 6),
    prompts=st.tuples(st.booleans(), st.integers(0, 4)),
    rounds=rounds,
)
@settings(max_examples=examples(12))
def test_candidates_are_taken_as_decoding_alone_would_take_them(store, merge, read, ragged, every, prompts, rounds):
    plan = plan_of(store, BUDGET, every, ragged=ragged and store not in ("tada", "latent"), merge=merge, read=read)
    layer, other, generator = new_layer(plan), new_layer(plan), torch.Generator().manual_seed(every)
    known, behind = prompts
    layer.activate_past_recording()
    tokens = entries(generator, 1, PROMPT + (behind if known else 0))
    layer.scheduler.prompt_end = PROMPT if known else None
    feed(other, *(one[:, :, :PROMPT] for one in tokens))
    expected, layers = (
        alone(other, tuple(one[:, :, PROMPT:] for one in tokens)) if known and behind else (None, [other])
    )
    output = feed(layer, *tokens)
    if expected is not None:
        assert torch.allclose(output[:, :, PROMPT:], expected, atol=1e-4)
    layer.crop(0)
    assert_alike(layer, layers[-1])
    for counts, rejected in rounds:
        for count in counts:
            tokens = entries(generator, 1, count)
            expected, more = alone(copied(layers[-1]), tokens)
            layers += more[1:]
            assert torch.allclose(feed(layer, *tokens), expected, atol=1e-4)
        undone = min(rejected, sum(counts))
        layer.crop(-undone)
        layers = [layers[len(layers) - 1 - undone]]
        assert_alike(layer, layers[0])


@pytest.mark.parametrize("merge", MERGES, ids=str)
def test_rows_may_move_while_candidates_are_recorded(merge):
    plan, generator = plan_of("plain", BUDGET, 3, merge=merge), torch.Generator().manual_seed(0)
    layer, other = new_layer(plan), new_layer(plan)
    prompt, tokens = entries(generator, 2, PROMPT), entries(generator, 2, 7)
    for one in (layer, other):
        feed(one, *prompt)
    layer.activate_past_recording()
    layer.expects_prompt = False
    feed(layer, *tokens)
    layer.reorder_cache(torch.tensor([1, 1]))
    layer.crop(-5)
    alone(other, tuple(one[:, :, :2] for one in tokens))
    other.reorder_cache(torch.tensor([1, 1]))
    assert_alike(layer, other)
