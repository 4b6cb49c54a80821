"""Tasks from recorded data: questions with verifiers, and turns of agents; the data itself is made up here."""

import pytest

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.data.questions import Question
from kvpolicy.evaluate.data.transcripts import Transcript, Turn
from kvpolicy.evaluate.tasks import agent_turns, questions
from kvpolicy.evaluate.tasks.case import Sources, TaskSizes
from kvpolicy.evaluate.tasks.names import require_tasks, task_of


@pytest.fixture
def tokenizer(sources):
    return sources.tokenizer


def told(count):
    return tuple(
        Question(
            f"How many are {index} and {index}?",
            str(2 * index),
            lambda text, right=str(2 * index): float(text == right),
        )
        for index in range(count)
    )


@pytest.mark.parametrize("name", ["gsm8k", "gym:chain_sum"])
def test_questions_are_asked_whole_and_judged_by_their_verifiers(tokenizer, name, monkeypatch):
    """In groups of eight; the question stands before what is computed behind the compression."""
    asked = []
    monkeypatch.setattr(questions, "gsm8k", lambda count, seed: asked.append(("gsm8k", seed)) or told(count))
    monkeypatch.setattr(questions, "reasoning_gym", lambda task, count, seed: asked.append((task, seed)) or told(count))
    groups = task_of(name).groups(Sources(tokenizer, ()), TaskSizes(documents=11, seed=7))

    assert [len(cases) for cases in groups] == [8, 3]
    assert asked == [(name.removeprefix("gym:"), 7)]
    for index, case in enumerate(case for cases in groups for case in cases):
        text = tokenizer.decode(case.prompt)
        assert f"How many are {index} and {index}?" in text
        assert "step by step" in text
        assert case.question
        assert case.scores["correct"](str(2 * index)) == 1
        assert case.scores["correct"]("none") == 0
        assert set(case.scores) == set(task_of(name).metrics)
        for many in (0, 1, 5):
            text = " ".join(["none"] * many)
            assert case.scores["written"](text) == len(tokenizer(text, add_special_tokens=False).input_ids)


def conversation(name, *lengths):
    roles = ("user", "assistant")
    return Transcript(
        name, tuple(Turn(roles[i % 2], " ".join(f"{name}{i}w{j}" for j in range(n))) for i, n in enumerate(lengths))
    )


def test_the_last_long_turn_of_an_agent_follows_the_end_of_what_came_before(tokenizer, monkeypatch):
    """Turns that are too short, or come too early, are passed over; so are conversations without any."""
    told = (conversation("a", 90, 60, 5, 1, 9), conversation("b", 2, 50, 3), conversation("c", 90, 40, 50, 70, 4))
    monkeypatch.setattr(agent_turns, "transcripts", lambda: told)
    (first,), (second,) = task_of("agent").groups(Sources(tokenizer, ()), TaskSizes(documents=2, length=100, scored=30))
    whole = [
        tokenizer(turn.content, add_special_tokens=False)["input_ids"] for turn in (told[0].turns[1], told[2].turns[3])
    ]

    for case, turn, before in ((first, whole[0], "a0w89"), (second, whole[1], "c2w49")):
        assert list(case.text) == turn[:30]
        assert len(case.prompt) == 100
        assert before in tokenizer.decode(case.prompt[-40:])
    assert "assistant" in tokenizer.decode(first.prompt[-20:])


def test_too_few_transcripts_are_an_error(tokenizer, monkeypatch):
    monkeypatch.setattr(agent_turns, "transcripts", lambda: (conversation("a", 90, 60),))
    with pytest.raises(
        EvaluationError, match="agent: 1 transcripts have 100 tokens before a turn of 16 and more: 2 are"
    ):
        task_of("agent").groups(Sources(tokenizer, ()), TaskSizes(documents=2, length=100))


def test_names_of_generators_are_taken_as_they_are():
    """Whether there is such a generator is known when it is asked; a name that is empty is unknown."""
    assert task_of("gym:chain_sum").name == "gym:chain_sum"
    assert "chain_sum" in task_of("gym:chain_sum").summary
    require_tasks(["gym:x", "agent", "gsm8k"], testbed=False)
    with pytest.raises(EvaluationError, match="task: unknown: 'gym:'"):
        task_of("gym:")
    with pytest.raises(EvaluationError, match="task: gsm8k is for models that read text"):
        require_tasks(["gsm8k"], testbed=True)
