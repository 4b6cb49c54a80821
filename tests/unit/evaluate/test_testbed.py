"""The testbed: its tasks are reproducible and right by a second computation, and its model solves them."""

import json
from importlib.resources import files

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.testbed import EVALUATED, Item, is_correct, load_testbed, make_item
from kvpolicy.evaluate.testbed.vocabulary import DIGITS, TOTALS, VOCABULARY
from tests.testbed_training.accuracy import measure, write
from tests.testbed_training.batches import ROWS, make_batch
from tests.testbed_training.tokenizer import build_tokenizer

MEBIBYTE = 2**20
HELD_OUT = 77
LENGTHS = (128, 700, 1500)


@pytest.fixture(scope="module")
def testbed() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    return load_testbed()


def sentences(text: str) -> list[list[str]]:
    return [sentence.split() for sentence in text.split(" .")]


def facts(item: Item, marker: str) -> dict[str, str]:
    found = [words for words in sentences(item.context) if words and words[0] == marker]
    assert len({words[1] for words in found}) == len(found)
    return {words[1]: words[2] for words in found}


def recalled(item: Item) -> str:
    return facts(item, "note")[item.question.split()[-1]]


def tracked(item: Item) -> str:
    given, name = facts(item, "set"), item.question.split()[-1]
    chain = []
    while name in given:
        name = given[name]
        chain.append(name)
    return " ".join(chain)


def reasoned(item: Item) -> str:
    values, links = facts(item, "value"), facts(item, "link")
    asked = next(words[1] for words in sentences(item.context) if words and words[0] == "report")
    name, total, reported, trace = item.question.split()[1], 0, -1, []
    while name != "end":
        before, total = total, (total + int(values[name])) % 10
        walked = f"value {name} {values[name]} link {name} {links[name]}"
        counted = f"total {name} {TOTALS[total]}"
        trace.append(f"{walked} sum {TOTALS[before]} {values[name]} {TOTALS[total]} {counted}")
        trace.append(f"check {walked} {counted} .")
        reported = total if name == asked else reported
        name = links[name]
    return " ".join([*trace, "report", asked, TOTALS[reported]])


SOLVERS = {"recall": recalled, "tracking": tracked, "reasoning": reasoned}


@pytest.mark.parametrize("task", EVALUATED)
@pytest.mark.parametrize("length", LENGTHS)
def test_target_follows_from_prompt(task: str, length: int) -> None:
    """A plain reading of the prompt's text gives the target, and its last word is the answer."""
    for index in range(5):
        item = make_item(task, 3, index, length)

        assert SOLVERS[task](item) == item.target
        assert item.target.split()[-1] == item.answer
        assert item.new_tokens == len(item.target.split()) + 1


@pytest.mark.parametrize("task", EVALUATED)
def test_items_are_reproducible_and_differ(task: str) -> None:
    """(task, seed, index, length) decides the item, and each of seed and index changes it."""
    item = make_item(task, 5, 2, 300)

    assert make_item(task, 5, 2, 300) == item
    assert len({item.prompt, make_item(task, 6, 2, 300).prompt, make_item(task, 5, 3, 300).prompt}) == 3


@pytest.mark.parametrize("task", EVALUATED)
@pytest.mark.parametrize("length", LENGTHS)
def test_length_is_close_to_what_was_asked(task: str, length: int) -> None:
    """The prompt (for reasoning prompt and trace) has about ``length`` tokens."""
    item = make_item(task, 1, 0, length)
    size = len(item.prompt.split()) + (item.new_tokens if task == "reasoning" else 0)

    assert abs(size - length) <= max(40, 0.06 * length)


def test_reasoning_writes_long_traces_and_asks_for_the_first_third() -> None:
    """At the default length the trace has 500 tokens or more, and the asked total stands in its first third."""
    for index in range(20):
        item = make_item("reasoning", 9, index)
        words = item.target.split()
        asked = words[-2]

        assert item.new_tokens >= 500
        assert words.index(asked) < len(words) / 3
        assert item.answer not in item.context.split()


@pytest.mark.parametrize(("task", "length"), [("riddle", 300), ("recall", 3), ("recall", 5000)])
def test_bad_requests_are_refused(task: str, length: int) -> None:
    """An unknown task and a length that the model cannot hold are errors of ours."""
    with pytest.raises(EvaluationError, match=r"must be"):
        make_item(task, 0, 0, length)


def test_scoring_takes_the_last_word_before_the_end() -> None:
    """Only the last word counts; nothing written is wrong."""
    item = make_item("tracking", 0, 0, 200)

    assert is_correct(item, item.target)
    assert is_correct(item, f"{item.answer} <eos> . .")
    assert not is_correct(item, f"{item.answer} .")
    assert not is_correct(item, "")


@pytest.mark.parametrize("task", EVALUATED)
def test_tokenizer_round_trip_without_unknown_words(task: str) -> None:
    """Text becomes one token a word after ``<bos>`` and comes back unchanged."""
    tokenizer = build_tokenizer()
    item = make_item(task, 2, 0, 400)
    ids = tokenizer(item.prompt).input_ids

    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(item.prompt.split())
    assert tokenizer.decode(ids, skip_special_tokens=True) == item.prompt


def test_vocabulary_has_no_word_twice() -> None:
    """Each word has one id; digits and totals are told apart."""
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert not set(DIGITS) & set(TOTALS)


@pytest.mark.parametrize("task", tuple(ROWS))
def test_batches_have_fixed_shape_and_are_seeded(task: str) -> None:
    """Every row is full, whatever the task; the same step gives the same batch."""
    batch, again = make_batch(1, 4, (task,) * 3, 256), make_batch(1, 4, (task,) * 3, 256)

    assert batch.tokens.shape == batch.weights.shape == (3, 256)
    assert torch.equal(batch.tokens, again.tokens)
    assert (batch.tokens != 0).all()
    assert (batch.weights.sum(dim=1) > 0).all()


def test_stored_files_are_small_and_tokenizer_is_the_code(
    testbed: tuple[LlamaForCausalLM, PreTrainedTokenizerFast],
) -> None:
    """The folder stays below 12 MiB; the stored tokenizer is the one that the code builds."""
    folder = files("kvpolicy.evaluate.testbed") / "weights"
    sizes = [len(file.read_bytes()) for file in folder.iterdir()]
    model, tokenizer = testbed

    assert sum(sizes) <= 12 * MEBIBYTE
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert tokenizer.padding_side == "left"
    assert model.config.num_key_value_heads == 2
    assert model.config.vocab_size == len(VOCABULARY)


def test_training_record_states_the_committed_accuracy() -> None:
    """``training.json`` holds the accuracy table, and every task reaches 95 % at about 1000 tokens."""
    record = json.loads((files("kvpolicy.evaluate.testbed") / "weights" / "training.json").read_text())
    rates = {row["task"]: row["answers"] / row["items"] for row in record["accuracy"] if row["length"] == 1024}

    assert set(rates) == set(EVALUATED)
    assert min(rates.values()) >= 0.95
    assert np.all([row["items"] >= 100 for row in record["accuracy"]])


@pytest.mark.parametrize(("task", "length"), [("recall", 1024), ("tracking", 1024), ("reasoning", 512)])
def test_model_answers_held_out_items(
    testbed: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], task: str, length: int
) -> None:
    """With its full cache the model answers nearly all of eight items that it has never seen."""
    model, tokenizer = testbed
    found = measure(model, tokenizer, task, seed=HELD_OUT, items=8, length=length, rows=8)

    assert found.answers >= 7


def test_left_padding_does_not_change_what_is_written(
    testbed: tuple[LlamaForCausalLM, PreTrainedTokenizerFast],
) -> None:
    """A row of a batch gives what it gives alone."""
    model, tokenizer = testbed
    items = [make_item("tracking", HELD_OUT, 0, 200), make_item("tracking", HELD_OUT, 1, 400)]

    assert write(model, tokenizer, items) == [write(model, tokenizer, [item])[0] for item in items]


def test_what_comes_with_the_package_stays_small() -> None:
    """The demo downloads nothing, so the weights are in the wheel and in the history of the repository."""
    weights = files("kvpolicy.evaluate.testbed").joinpath("weights")
    assert 0 < sum(len(one.read_bytes()) for one in weights.iterdir()) < 5_000_000
