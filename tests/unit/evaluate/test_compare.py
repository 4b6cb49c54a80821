"""Comparisons: honest bytes, the same items for all, repeatable answers, a complete record."""

import json
from fractions import Fraction

import attrs
import pytest
import torch
from kvpolicy.evaluate.answers import answer, total_tokens
from kvpolicy.evaluate.compare import compare, steps
from kvpolicy.evaluate.comparison_data import comparison_data
from kvpolicy.evaluate.fit import fit
from kvpolicy.evaluate.scoring import before_mistake, is_whole
from kvpolicy.evaluate.setup import Contender, Setup
from transformers import DynamicCache

from kvpolicy.bench.caches.meter import held_bytes
from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate import environment
from kvpolicy.evaluate.testbed import Item, make_item

SHARE = Fraction(1, 4)


@pytest.fixture(scope="module")
def setup(policies):
    return Setup(policies, (SHARE,), tasks=("recall", "tracking"), items=3, length=128, rows=2, seed=5)


@pytest.fixture(scope="module")
def outcomes(tiny, setup):
    """With the calls that the progress display got."""
    calls = []
    return compare(*tiny, setup, calls.append), calls


def short(task, index):
    return attrs.evolve(make_item(task, 0, index, 128), new_tokens=6)


def test_one_outcome_for_each_contender_and_task(outcomes, setup):
    """The full cache and each policy, on each task, with all items."""
    found, calls = outcomes

    assert [(one.task, one.contender) for one in found] == [(t, c) for t in setup.tasks for c in setup.contenders]
    assert {one.items for one in found} == {3}
    assert len(calls) == steps(setup) == 2 * 3 * 2


def test_bytes_held_stay_within_the_share(outcomes):
    """Policies hold no more than their share of what the full cache holds; the full cache holds all of it."""
    for one in outcomes[0]:
        assert one.held_share <= one.contender.share
        assert one.held_share > one.contender.share - 0.06
        assert one.peak_bytes >= one.held_bytes
        assert (one.window_bytes > 0) == (one.contender.name == "snapkv")
        assert one.decode_speed > 0
        assert one.prompt_speed > 0


def test_answers_are_repeatable(tiny, outcomes, setup):
    """Apart from speeds, the same setup gives the same outcomes, whatever the order in which contenders take turns."""
    again = compare(*tiny, attrs.evolve(setup, rows=3))
    keys = ("contender", "task", "whole", "last_word", "before_mistake", "policy")

    assert [[getattr(one, key) for key in keys] for one in again] == [
        [getattr(one, key) for key in keys] for one in outcomes[0]
    ]


def test_full_cache_is_the_plain_model(tiny):
    """No policy means transformers' own cache, and what it writes."""
    model, tokenizer = tiny
    item = short("recall", 0)
    given, cache = answer(model, tokenizer, [item], None)
    inputs = tokenizer(f"{item.prompt} {item.question}", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs.input_ids.shape[1] :]

    assert type(cache) is DynamicCache
    assert given.texts == (tokenizer.decode(written, skip_special_tokens=True),)
    assert given.held_bytes == given.peak_bytes == cache.get_seq_length() * 2 * 2 * 2 * 8 * 4
    assert given.prompt_tokens == inputs.input_ids.shape[1]


def test_speed_counts_every_row_until_the_last_is_done(tiny, monkeypatch):
    """A policy whose answers break off early must not look slower: the pads behind are computed all the same."""
    model, tokenizer = tiny
    items = [short("recall", 0), short("recall", 1)]
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    given, _ = answer(model, tokenizer, items, None)

    assert given.new_tokens == 2 * 6


def test_an_unseen_question_is_asked_once(tiny):
    """The prompt is then the context and the question, in two forwards; reasoning is always so."""
    model, tokenizer = tiny
    recall, reasoning = short("recall", 0), short("reasoning", 0)
    tokens = {item.task: len(tokenizer(item.prompt).input_ids) for item in (recall, reasoning)}

    assert answer(model, tokenizer, [recall], None, "unseen")[0].prompt_tokens == tokens["recall"]
    assert answer(model, tokenizer, [recall], None, "seen")[0].prompt_tokens == tokens["recall"] + 2
    assert answer(model, tokenizer, [reasoning], None, "seen")[0].prompt_tokens == tokens["reasoning"]
    assert total_tokens(tokenizer, recall, "seen") == tokens["recall"] + 2 + recall.new_tokens - 1


def test_batches_with_questions_of_different_lengths_are_refused(tiny):
    """They could not follow their contexts without pads between."""
    model, tokenizer = tiny
    longer = attrs.evolve(short("recall", 1), question="ask the falcon")

    with pytest.raises(EvaluationError, match="questions of one batch must be of one length"):
        answer(model, tokenizer, [short("recall", 0), longer], None)


def test_peak_counts_the_layer_that_is_being_compressed(tiny, policies):
    """After the prompt layer 0 is down to its budget while layer 1 is still whole: more than what is held later."""
    model, tokenizer = tiny
    fitted = fit(policies[0], model, length=130, share=SHARE)
    given, cache = answer(model, tokenizer, [short("recall", 0)], fitted)
    whole = max(layer.stats.peak_entry_bytes for layer in cache.managed)
    small = cache.managed[0].storage.nbytes

    assert given.held_bytes == held_bytes(cache) == 2 * small
    assert given.peak_bytes == whole + small


def test_model_is_given_back(tiny, outcomes):
    """No hook and no attachment is left."""
    model, _ = tiny

    assert not any(module._forward_hooks for module in model.modules())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("written", "whole", "share"),
    [
        ("falcon maple gold", True, 1.0),
        ("falcon maple", False, 2 / 3),
        ("falcon gold", False, 1 / 3),
        ("gold", False, 0.0),
        ("", False, 0.0),
        ("falcon maple gold gold", False, 1.0),
    ],
)
def test_an_answer_counts_up_to_its_first_mistake(written, whole, share):
    """Ending in the right word is not enough: the trace may have broken off."""
    item = Item("tracking", "", "", "falcon maple gold", "gold", 4)

    assert is_whole(item, written) is whole
    assert before_mistake(item, written) == share


@pytest.mark.parametrize(("said", "own"), [("2.13.0", "2.13.0+cu130"), ("2.13.0+cpu", "2.13.0+cpu")])
def test_record_says_which_build_of_torch_ran(monkeypatch, said, own):
    """The metadata of the public index's CUDA builds leaves the build out."""
    monkeypatch.setattr(environment.metadata, "version", lambda _name: said)
    monkeypatch.setattr(torch, "__version__", own)

    assert environment.versions()["torch"] == own


def test_record_is_complete_json(outcomes, setup):
    """Versions, machine, seed, digests, and that the question was visible."""
    data = json.loads(json.dumps(comparison_data(setup, outcomes[0])))

    assert data["versions"]["torch"] == torch.__version__
    assert data["machine"]["threads"] == torch.get_num_threads()
    assert data["setup"]["seed"] == 5
    assert data["setup"]["question"] == "seen"
    assert {one["question_visible_to_scorers"] for one in data["outcomes"]} == {True}
    digests = [one["digest"] for one in data["outcomes"]]
    assert digests == [one.policy and one.policy.digest for one in outcomes[0]]
    assert data["outcomes"][1]["fitted_policy"].startswith("kvpolicy: 1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": 0}, "items must be at least 1: 0"),
        ({"length": 5}, "length must be from 128 to 2048: 5"),
        ({"question": "maybe"}, "question must be one of seen, unseen: 'maybe'"),
        ({"seed": -1}, "seed must be at least 0: -1"),
        ({"shares": (Fraction(1),)}, "a share must be above 0% and below 100%: 100%"),
        ({"twice": True}, "policies must have different names: snapkv"),
    ],
)
def test_bad_setups_are_refused(setup, change, message):
    """Each with its rule and value."""
    if change.pop("twice", False):
        change["policies"] = (*setup.policies, setup.policies[0])
    with pytest.raises(EvaluationError, match=message):
        attrs.evolve(setup, **change)


def test_labels_name_policy_and_share(policies):
    """As the table shows them."""
    assert Contender(policies[0], Fraction(1, 8)).label == "snapkv 12.5%"
    assert Contender().label == "full cache"
