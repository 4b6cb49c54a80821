"""Every class is refused with nothing changed, or exact: a dozen by default, all with KVPOLICY_SWEEP=all."""

import os

import pytest

from tests.models_sweep import record
from tests.models_sweep.children import examine_apart
from tests.models_sweep.examine import EXACT, NOT_TRIED, REFUSED, WRONG, examine
from tests.models_sweep.pairs import Pair, all_pairs

FEW = {
    "text:llama": EXACT,  # the plain case
    "text:gemma3_text": EXACT,  # sliding layers between full ones
    "text:gpt2": EXACT,  # learned absolute positions
    "text:gpt_neox": EXACT,  # rotary positions on a part of a head
    "text:cohere": EXACT,  # interleaved rotary positions, a block in parallel
    "text:olmoe": EXACT,  # experts
    "text:phi3:longrope": EXACT,  # rotary positions that depend on the length
    "text:bert:decoder": EXACT,  # an encoder turned decoder
    "text:hrm_text": EXACT,  # the same modules several times, each time with another layer of the cache
    "image:qwen3_vl": EXACT,  # positions in three dimensions
    "image:llava_onevision": EXACT,  # a language model within another
    "text:bloom": REFUSED,  # ALiBi, its own attention
    "text:bert": REFUSED,  # attends in both directions
    "text:diffllama": REFUSED,  # two calls of attention a layer
    "text:mllama": REFUSED,  # layers that attend to an image
}
EVERYTHING = os.environ.get("KVPOLICY_SWEEP") == "all"
CASES = {pair.name: None for pair in all_pairs()} if EVERYTHING else FEW


@pytest.mark.parametrize("name", CASES)
def test_a_class_is_refused_with_nothing_changed_or_exact(name):
    # Of all classes some hang, and each has a process of its own; of the few it is known that they do not.
    verdict = examine_apart(Pair.of(name)) if EVERYTHING else examine(Pair.of(name))
    assert verdict.kind != WRONG, verdict.why
    assert CASES[name] in (None, verdict.kind), verdict.why
    if record.versions() == record.read()["versions"]:
        assert verdict.kind == record.read()["verdicts"][name]["kind"], "the record is not current"


def test_the_page_says_what_the_record_says():
    assert record.PAGE.read_text(encoding="utf-8") == record.page(record.read())


def test_the_record_is_of_all_classes_and_nothing_in_it_is_wrong():
    found = record.read()
    assert not [name for name, verdict in found["verdicts"].items() if verdict["kind"] == WRONG]
    if record.versions()["transformers"] == found["versions"]["transformers"]:
        assert set(found["verdicts"]) == {pair.name for pair in all_pairs()}


def test_a_class_that_takes_too_long_is_ended():
    assert examine_apart(Pair("text", "llama"), seconds=0.001).kind == NOT_TRIED
