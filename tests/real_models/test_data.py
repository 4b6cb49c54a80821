"""Texts, questions and conversations of real data, as they are published on the package index."""

import re

import pytest

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.data.questions import gsm8k
from kvpolicy.evaluate.data.texts import essays
from kvpolicy.evaluate.data.transcripts import transcripts


def test_essays():
    found = essays()

    assert len(found) == 49
    assert 600_000 < sum(len(one.text.encode()) for one in found) < 700_000
    assert [one.name for one in found] == sorted(one.name for one in found)
    assert len({one.digest for one in found}) == 49


def test_questions_accept_their_own_answers_only():
    for question in gsm8k(100, seed=3):
        number = float(re.search(r"#### (.*)$", question.answer)[1].replace(",", ""))
        assert question.check(question.answer) == 1
        assert question.check(f"I think it is {number:.2f}.") == 1
        assert question.check(f"I think it is {number + 1}.") == 0
        assert question.check("I do not know.") == 0


def test_the_seed_decides_the_questions():
    def prompts(seed):
        return [question.prompt for question in gsm8k(5, seed)]

    assert prompts(1) == prompts(1) != prompts(2)


def test_more_questions_than_there_are():
    with pytest.raises(EvaluationError, match="gsm8k has 100 questions: count must be from 1 to 100: 101"):
        gsm8k(101, 0)


def test_transcripts():
    found = transcripts()

    assert len({one.name for one in found}) == 48
    assert all(len(one.turns) >= 3 and one.turns[-1].role == "user" for one in found)
    assert {turn.role for one in found for turn in one.turns} == {"user", "assistant"}
