"""A budget that holds everything changes nothing, to the last bit."""

import pytest
import torch

import kvpolicy
from tests.support import policies
from tests.support.models import ARCHITECTURES, build, difference, generate, model, prompt

LENGTHS = {"alone": (40,), "padded": (40, 29, 3)}


def assert_same(plain, compressed):
    assert torch.equal(plain.sequences, compressed.sequences)
    assert difference(plain, compressed) == 0


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_bit_changes_in_any_architecture(architecture, lengths):
    one = model(architecture)
    tokens, mask = prompt(*lengths)
    plain = generate(one, tokens, mask)
    for name in ("full", "rkv", "adakv"):
        with kvpolicy.load(name).attach(one):
            assert_same(plain, generate(one, tokens, mask))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", policies.NAMES)
def test_no_bit_changes_under_any_policy(name, lengths):
    tokens, mask = prompt(*lengths)
    plain = generate(model(), tokens, mask)
    with kvpolicy.load(name).attach(model()):
        assert_same(plain, generate(model(), tokens, mask))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_no_bit_changes_in_half_precision(lengths):
    one = model("qwen3", dtype=torch.bfloat16)
    tokens, mask = prompt(*lengths)
    plain = generate(one, tokens, mask)
    with kvpolicy.load("snapkv").attach(one):
        assert_same(plain, generate(one, tokens, mask))


@pytest.mark.parametrize("budget", [64, "100%", "1MiB"])
def test_a_budget_that_is_just_enough_changes_nothing(budget):
    tokens, mask = prompt(40)
    plain = generate(model(), tokens, mask)
    with kvpolicy.load("rkv", budget=budget, compress={"every": 4}).attach(model()):
        assert_same(plain, generate(model(), tokens, mask))


def test_a_budget_one_below_the_length_changes_something():
    tokens, mask = prompt(40)
    with kvpolicy.load("rkv", budget=39, compress={"every": 4}).attach(model()):
        assert difference(generate(model(), tokens, mask), generate(build(), tokens, mask)) > 0


@pytest.mark.parametrize("name", ["snapkv", "h2o", "adakv"])
def test_the_prompt_is_exact_whatever_the_budget(name):
    tokens, mask = prompt(40, 29)
    plain = generate(model(), tokens, mask, count=1)
    with policies.small(name, budget=8).attach(model()):
        assert_same(plain, generate(model(), tokens, mask, count=1))


def test_other_models_are_exact_while_one_is_attached():
    tokens, mask = prompt(40)
    other = build(seed=1)
    plain = generate(other, tokens, mask)
    with policies.small("snapkv").attach(model()):
        generate(model(), tokens, mask)
        assert_same(plain, generate(other, tokens, mask))
