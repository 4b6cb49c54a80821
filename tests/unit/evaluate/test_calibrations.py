"""Stores are calibrated once each, on text of their own; and what comparisons do with that."""

from fractions import Fraction

import attrs
import pytest
import torch
from kvpolicy.evaluate.answers import answer
from kvpolicy.evaluate.calibrations import Calibrations
from kvpolicy.evaluate.compare import compare
from kvpolicy.evaluate.setup import Setup

import kvpolicy
from kvpolicy.evaluate.testbed import make_item
from kvpolicy.evaluate.testbed.vocabulary import IDS, PAD


@pytest.fixture
def calibrations(tiny):
    return Calibrations(tiny[0], sequences=3, length=64)


@pytest.fixture(scope="module")
def sals():
    return kvpolicy.load("sals25", store={"use": "latent", "rank": 0.25, "value_group": 8})


def test_text_is_real_and_repeatable(tiny, calibrations):
    """No pads, all tasks in turn, the same every time."""
    tokens = calibrations.tokens

    assert tokens.shape == (3, 64)
    assert not (tokens == IDS[PAD]).any()
    assert torch.equal(tokens, Calibrations(tiny[0], 3, 64).tokens)


def test_each_store_is_calibrated_once(calibrations, sals):
    """And those that need it only."""
    first = calibrations.of(sals)

    assert first is calibrations.of(attrs.evolve(sals, origin="elsewhere"))
    assert calibrations.of(kvpolicy.load("snapkv")) is None
    assert calibrations.of(None) is None
    assert calibrations.plan(sals).formats[0].keys.joint


def test_comparisons_calibrate_what_needs_it(tiny, sals):
    """The way of the demo."""
    setup = Setup((sals,), (Fraction(1, 4),), tasks=("recall",), items=1, length=128)
    outcomes = compare(*tiny, setup)

    assert outcomes[1].held_share < 1


def test_positions_do_not_count_pads(tiny):
    """The context's positions are those that `generate` goes on from, so that rows mean what they mean alone."""
    model, tokenizer = tiny
    seen = []
    hook = model.model.register_forward_pre_hook(
        lambda _module, _args, call: seen.append(call["position_ids"]), with_kwargs=True
    )
    try:
        items = [attrs.evolve(make_item("recall", 0, index, 128), new_tokens=2) for index in range(3)]
        answer(model, tokenizer, items, None)
    finally:
        hook.remove()
    lengths = [len(tokenizer(item.prompt).input_ids) for item in items]

    assert len(set(lengths)) > 1
    assert seen[0][:, -1].tolist() == [length - 1 for length in lengths]
    assert seen[1][:, 0].tolist() == lengths
