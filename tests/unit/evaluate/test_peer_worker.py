"""What runs in the environment of the peers, here in this process: which bytes it counts, and what it computes."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from transformers import DynamicCache

from kvpolicy.evaluate.peers.worker.caches import UnknownPeerError, cache_of
from kvpolicy.evaluate.peers.worker.held import held_bytes
from kvpolicy.evaluate.peers.worker.run import CaseRun
from tests.support.models import build, generate, prompt

LENGTH, STEP = 40, 4
KEPT = [0, 3, 4, 11, 12, 13, 30, 38, 39]


@pytest.fixture(scope="module")
def model():
    return build()


def ids(count, seed):
    return prompt(count, seed=seed)[0][0].tolist()


def cases_of(*cases, stop=()):
    return {"prompts": [ids(LENGTH, 1), ids(LENGTH, 2)], "cases": cases, "step": STEP, "stop": list(stop), "timed": 3}


def text(row, seed):
    return {"prompt": row, "text": ids(10, seed)}


def question(row, *seeds):
    return {"prompt": row, "turns": [{"question": ids(3, seed), "new_tokens": 6} for seed in seeds]}


def evicting(model):
    """A full cache of which a press keeps some entries of the prompt, and no query more than them."""

    @contextmanager
    def press(cache):
        yield
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, KEPT].clone(), layer.values[:, :, KEPT].clone()

    def make():
        cache = DynamicCache(config=model.config)
        return cache, press(cache)

    return make


@torch.inference_mode()
def measured(model, make, cases):
    return CaseRun(model, make, cases).measured()


# -- what is computed ------------------------------------------------------------------------------------------


def test_texts_behind_a_full_cache_are_predicted_as_by_the_plain_model(model):
    cases = cases_of(text(1, 7), text(0, 8), text(1, 9))
    facts, logits = measured(model, cache_of("full", model, None), cases)

    assert logits.keys() == {"0", "1", "2"}
    for index, case in enumerate(cases["cases"]):
        tokens = torch.tensor([cases["prompts"][case["prompt"]] + case["text"]])
        with torch.no_grad():
            expected = model(tokens).logits[0, LENGTH:]
        torch.testing.assert_close(logits[str(index)], expected, atol=1e-4, rtol=1e-4)
    assert facts["tokens"] == [[], [], []]
    assert facts["prefill_seconds"] > 0
    assert facts["step_seconds"] > 0


def test_after_an_eviction_tokens_stand_where_they_stood_and_see_what_was_kept(model):
    """Against one forward in which the text does not see what was evicted."""
    cases = cases_of(text(0, 7))
    _, logits = measured(model, evicting(model), cases)
    tokens = torch.tensor([cases["prompts"][0] + cases["cases"][0]["text"]])
    seen = torch.ones(tokens.shape[1], tokens.shape[1]).tril().bool()
    seen[LENGTH:, [place for place in range(LENGTH) if place not in KEPT]] = False
    with torch.no_grad():
        expected = model(tokens, attention_mask=seen[None, None]).logits[0, LENGTH:]

    torch.testing.assert_close(logits["0"], expected, atol=1e-4, rtol=1e-4)


def test_answers_are_those_of_greedy_generation_up_to_a_token_that_ends_them(model):
    cases = cases_of(question(0, 7), question(1, 8))
    facts, logits = measured(model, cache_of("full", model, None), cases)
    expected = []
    for case in cases["cases"]:
        tokens = torch.tensor([cases["prompts"][case["prompt"]] + case["turns"][0]["question"]])
        expected.append(generate(model, tokens, count=6).sequences[0, tokens.shape[1] :].tolist())
    end = expected[0][2]
    stopped, _ = measured(model, cache_of("full", model, None), cases_of(question(0, 7), stop=[end]))

    assert facts["tokens"] == [[answer] for answer in expected]
    assert logits == {}
    assert stopped["tokens"] == [[expected[0][: expected[0].index(end) + 1]]]


@pytest.mark.parametrize("ended", [False, True])
def test_a_further_question_is_asked_behind_the_answer(model, ended):
    """Without the token that ended it, which the question brings."""
    given = cases_of(question(0, 7, 8))
    first, second = (turn["question"] for turn in given["cases"][0]["turns"])
    tokens = given["prompts"][0] + first
    answer = generate(model, torch.tensor([tokens]), count=6).sequences[0, len(tokens) :].tolist()
    stop = answer[2:3] if ended else []
    answer = answer[: answer.index(stop[0]) + 1] if ended else answer
    tokens += (answer[:-1] if ended else answer) + second
    further = generate(model, torch.tensor([tokens]), count=6).sequences[0, len(tokens) :].tolist()
    found, _ = measured(model, cache_of("full", model, None), {**given, "stop": stop})
    ends = [place for place, token in enumerate(further) if token in stop]

    assert found["tokens"] == [[answer, further[: ends[0] + 1] if ends else further]]
    assert found["end_tokens"] == len(tokens) + len(found["tokens"][0][1]) - 1


def test_bytes_are_those_after_the_prompt_and_in_the_end(model):
    token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dimensions, float32
    full, _ = measured(model, cache_of("full", model, None), cases_of(text(0, 7), text(1, 8)))
    less, _ = measured(model, evicting(model), cases_of(question(0, 7)))

    assert (full["prompt_bytes"], full["end_bytes"]) == (LENGTH * token, (LENGTH + 10) * token)
    assert full["end_tokens"] == LENGTH + 10
    assert (less["prompt_bytes"], less["end_bytes"]) == (len(KEPT) * token, (len(KEPT) + 3 + 5) * token)
    assert less["end_tokens"] == LENGTH + 3 + 5


def test_a_cache_that_cannot_be_copied_is_made_again(model):
    class Uncopied(DynamicCache):
        def __deepcopy__(self, memo):
            raise RuntimeError("cannot be copied")

    def make():
        return Uncopied(config=model.config), contextmanager(lambda: iter([None]))()

    cases = cases_of(text(0, 7), text(0, 8), question(1, 9))
    facts, logits = measured(model, make, cases)
    expected, others = measured(model, cache_of("full", model, None), cases)

    assert facts["tokens"] == expected["tokens"]
    assert all(torch.equal(logits[name], others[name]) for name in others)


# -- which bytes are held --------------------------------------------------------------------------------------


def cache_with(**held):
    return SimpleNamespace(layers=[SimpleNamespace(**held)])


def test_a_view_holds_all_of_its_storage_and_a_storage_counts_once():
    whole = torch.zeros(10, 4)
    assert held_bytes(cache_with(keys=whole[:2], values=whole[2:4], other=torch.zeros(3, dtype=torch.int8))) == 163


def test_parts_of_packed_entries_count_wherever_they_are():
    packed = TwoTensor(torch.zeros(5), torch.zeros(5))
    meta = {"scale": torch.zeros(2), "shape": (3, 4), "more": [torch.zeros(1)]}

    assert held_bytes(cache_with(keys=packed, _quantized=(torch.zeros(6, dtype=torch.uint8), meta))) == 40 + 6 + 8 + 4


def test_values_that_contain_themselves_are_counted():
    held = {"keys": torch.zeros(2)}
    held["again"] = held
    assert held_bytes(cache_with(meta=held)) == 8


# -- names -----------------------------------------------------------------------------------------------------


def test_presses_are_told_the_ratio_and_keep_their_defaults(model, monkeypatch):
    made = []

    def press(name):
        def build(*inner, **options):
            made.append((name, inner, options))
            return lambda _model: name

        return build

    names = ("SnapKVPress", "AdaKVPress", "TOVAPress", "ExpectedAttentionPress", "KeyDiffPress", "KVzipPress")
    presses = {name: press(name) for name in (*names, "StreamingLLMPress")}
    monkeypatch.setitem(sys.modules, "kvpress", SimpleNamespace(**presses))

    for name in ("snapkv", "tova", "expected_attention", "keydiff", "kvzip", "streaming_llm"):
        assert cache_of(name, model, 0.75)()[1] == made[-1][0]
        assert made[-1][2]["compression_ratio"] == 0.75
    assert made[0] == ("SnapKVPress", (), {"compression_ratio": 0.75, "window_size": 64})
    assert cache_of("adakv", model, 0.75)()[1] == "AdaKVPress"


@pytest.mark.parametrize(("name", "ratio"), [("nope", 0.5), ("snapkv", None)])
def test_a_name_that_is_none_is_told(model, monkeypatch, name, ratio):
    monkeypatch.setitem(sys.modules, "kvpress", SimpleNamespace())
    with pytest.raises(UnknownPeerError, match=name):
        cache_of(name, model, ratio)()
