"""Items of the embedded model as cases: what is compressed, what is asked behind it, how answers count."""

import attrs
import pytest

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.tasks.case import Sources, TaskSizes
from kvpolicy.evaluate.tasks.generated import Generated
from kvpolicy.evaluate.tasks.names import TASKS, TESTBED_TASKS, task_of
from kvpolicy.evaluate.testbed import Item, make_item
from kvpolicy.evaluate.testbed.vocabulary import BOS

ITEM = Item("tracking", "set falcon gold .", "ask falcon", "falcon maple gold", "gold", 4)


@pytest.fixture(scope="module")
def sources(tiny):
    return Sources(tiny[1], ())


def text_of(sources, ids):
    return sources.tokenizer.decode(list(ids))


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if isinstance(task, Generated)])
def test_cases_are_the_items_of_the_stream(sources, name):
    """In their order; the question stands behind, and at the end of the prompt where scorers may see it."""
    task = task_of(name)
    (cases,) = task.groups(sources, TaskSizes(documents=3, length=128, seed=5))
    for index, case in enumerate(cases):
        item = make_item(task.task, 5, index, 128)
        shown = item.context if name in ("reasoning", "recall-unseen", "tracking-unseen") else item.prompt
        assert text_of(sources, case.prompt) == f"{BOS} {shown}"
        assert text_of(sources, case.question) == item.question
        assert case.new_tokens == item.new_tokens
        assert case.tokens == len(f"{BOS} {shown} {item.question}".split()) + item.new_tokens - 1
        written = {"written": len(item.target.split())} if name == "reasoning" else {}
        scores = {metric: score(item.target) for metric, score in case.scores.items()}
        assert scores == {"correct": 1, "prefix": 1, **written}


@pytest.mark.parametrize(("documents", "sizes"), [(1, [1]), (16, [16]), (17, [16, 1]), (40, [16, 16, 8])])
def test_groups_hold_sixteen_items(sources, documents, sizes):
    groups = task_of("recall").groups(sources, TaskSizes(documents=documents, length=128))

    assert [len(cases) for cases in groups] == sizes
    assert len({case.prompt for cases in groups for case in cases}) == documents


def test_another_seed_gives_other_items(sources):
    one, again, other = (
        [case.prompt for (case,) in task_of("recall").groups(sources, TaskSizes(documents=1, length=128, seed=seed))]
        for seed in (1, 1, 2)
    )

    assert one == again != other


@pytest.mark.parametrize(
    ("written", "whole", "share"),
    [
        ("falcon maple gold", 1.0, 1.0),
        ("falcon maple", 0.0, 2 / 3),
        ("falcon gold", 0.0, 1 / 3),
        ("falcon gold gold", 0.0, 1 / 3),
        ("gold", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("falcon maple gold gold", 0.0, 1.0),
    ],
)
def test_an_answer_counts_up_to_its_first_mistake(sources, written, whole, share):
    """Ending in the right word is not enough, nor is going on behind it: the end has to be written."""
    scores = Generated("tracking", "").case(sources, ITEM).scores

    assert scores["correct"](written) == whole
    assert scores["prefix"](written) == share


def test_an_item_without_a_question_is_refused(sources):
    with pytest.raises(EvaluationError, match="tracking: an item without a question"):
        Generated("tracking", "").case(sources, attrs.evolve(ITEM, question=""))


def test_three_tasks_are_run_by_default():
    """Not `reasoning`, at which every policy fails alike."""
    assert TESTBED_TASKS == ("recall", "recall-unseen", "tracking")
    assert all(task_of(name).name == name for name in TESTBED_TASKS)
