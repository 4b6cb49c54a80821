"""Cases of real text: what stands where, what is asked, and what is right."""

import ast
import re
from itertools import pairwise

import attrs
import pytest

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.tasks.case import TaskSizes, ids_of
from kvpolicy.evaluate.tasks.code import passes
from kvpolicy.evaluate.tasks.names import TASKS, require_tasks, task_of
from tests.support.texts import TEXTS

SIZES = TaskSizes(documents=3, length=600, scored=20, questions=3, seed=4)
SEEN = {"needle": True, "needle-unseen": False, "needles": True, "needles-unseen": False, "needles-two": True}
NEEDLE = re.compile(r"One of the special magic numbers for (\w+) is: (\d+)\. ")


def text_of(sources, ids):
    return sources.tokenizer.decode(list(ids))


def asked_about(text):
    """The cities or the value that a question names."""
    return re.findall(r"\b(?:[A-Z][a-z]+)\b", text.partition("for ")[2].partition(" mentioned")[0])


# -- turns -----------------------------------------------------------------------------------------------------


def test_every_needle_is_asked_for_in_a_turn_of_its_own(sources):
    firsts = set()
    for (case,) in task_of("turns").groups(sources, SIZES):
        numbers = dict(NEEDLE.findall(text_of(sources, case.prompt)))
        turns = [(text_of(sources, case.prompt)[-200:], case.scores)]
        turns += [(text_of(sources, turn.question), turn.scores) for turn in case.more]
        asked = [asked_about(text[text.rindex("What ") :])[0] for text, _ in turns]
        assert sorted(asked) == sorted(numbers)
        firsts.add(list(numbers).index(asked[0]))
        for city, (_, scores) in zip(asked, turns, strict=True):
            assert scores["correct"](f" {numbers[city]}.") == 1
            assert [scores["correct"](number) for other, number in numbers.items() if other != city] == [0] * 3
    assert len(firsts) > 1


# -- code ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["code", "code-unseen"])
def test_code_is_a_file_that_runs_and_whose_tests_pass_with_the_right_literal(sources, name):
    """The file is executed here, and every function called."""
    for cases in task_of(name).groups(sources, SIZES):
        for case in cases:
            whole = text_of(sources, case.prompt + case.question).removeprefix("<s>")
            source, _, test = whole.rpartition("\n\ndef test_")
            tested = test.partition("_code")[0]
            made = re.findall(r"def (\w+)_code\(\):\n    return (\d+)\n", source)
            numbers = dict(made)
            ast.parse(source)
            assert len(numbers) == 4
            assert test == f"{tested}_code():\n    assert {tested}_code() == "
            score = case.scores["correct"]
            assert score(f"{numbers[tested]}\n\ndef more") == score(f" {numbers[tested]}  # right") == 1
            assert [score(number) for other, number in made if other != tested] == [0] * 3
            seen = task_of(name).seen
            assert text_of(sources, case.prompt).endswith("_code() ==" if seen else "\n\n")
    assert len({case.scores["correct"] for case in cases}) == 3


@pytest.mark.parametrize(
    "written",
    ["", "\n", "1 +", "print(1)", "__import__('os').abort()", "f()", "[" * 300, "'12345'", "1" * 5000, "\x00"],
)
def test_what_is_written_is_never_run(written):
    assert passes("def f():\n    return 12345\n", "f")(written) == 0


def test_functions_of_a_file_stand_at_depths_that_are_spread_evenly(sources):
    sizes = attrs.evolve(SIZES, length=12_000)
    for index, cases in enumerate(task_of("code").groups(sources, sizes)):
        text = text_of(sources, cases[0].prompt).removeprefix("<s>").rpartition("def test_")[0]
        names = re.findall(r"^def (\w+)", text, re.MULTILINE)
        places = [place for place, name in enumerate(names) if name.endswith("_code")]
        count = len(names) - 4
        assert count > 8
        assert [place - order for order, place in enumerate(places)] == [
            int((order * 3 + index + 0.5) / 12 * count) for order in range(4)
        ]


# -- needles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEEN)
def test_needles_stand_where_their_depths_say(sources, name):
    """Evenly spread, shifted from document to document, so that all depths occur."""
    groups, depths = task_of(name).groups(sources, SIZES), []
    for index, cases in enumerate(groups):
        text = text_of(sources, cases[0].prompt)
        needles = len(NEEDLE.findall(text))
        hay = len(re.findall(r"Sentence \d+:", text))
        assert needles == (1 if name.startswith("needle-") or name == "needle" else 4)
        for order, found in enumerate(NEEDLE.finditer(text)):
            before = len(re.findall(r"Sentence \d+:", text[: found.start()]))
            depth = (order * 3 + index + 0.5) / (3 * needles)
            depths.append(depth)
            assert before == int(depth * hay)

    assert [round(after - before, 9) for before, after in pairwise(sorted(depths))] == [round(1 / len(depths), 9)] * (
        len(depths) - 1
    )


@pytest.mark.parametrize("name", SEEN)
def test_a_needle_is_a_sentence_between_whole_ones(sources, name):
    """Nothing of the text is broken or lost: without needles it is a run of the sentences as they are."""
    every = "".join(text.text for text in TEXTS)
    for cases in task_of(name).groups(sources, SIZES):
        text = NEEDLE.sub("", text_of(sources, cases[0].prompt))
        body = text[text.index("Sentence ") : text.rindex(" by the river. ") + len(" by the river. ")]
        assert body in every + every
        assert len({case.prompt[:300] for case in cases}) == 1


@pytest.mark.parametrize("name", SEEN)
def test_question_and_numbers_belong_together(sources, name):
    """The numbers that the text gives for the cities asked about are right, with and without commas; others are not."""
    two, seen_questions = name.endswith("two"), set()
    for cases in task_of(name).groups(sources, SIZES):
        numbers = dict(NEEDLE.findall(text_of(sources, cases[0].prompt)))
        assert all(len(number) == 5 for number in numbers.values())
        assert len(cases) == (1 if len(numbers) == 1 else 2 if two else 3)  # of four numbers
        for case in cases:
            whole = text_of(sources, case.prompt + case.question)
            question = whole[whole.rindex("What ") :]
            cities = asked_about(question)
            right = [numbers[city] for city in cities]
            others = [number for city, number in numbers.items() if city not in cities]
            score = case.scores["correct"]
            assert len(cities) == (2 if two else 1)
            assert score(" is ".join(right)) == 1
            assert score(" and ".join(f"{int(number):,}" for number in right)) == 1
            assert score(" ".join(others)) == 0
            assert score(right[0]) == (0.5 if two else 1)
            assert score(right[0][:-1]) == 0
            assert case.new_tokens >= sum(len(ids_of(sources.tokenizer, f" {number},")) for number in right)
            seen_questions.add((cases[0].prompt[:400], tuple(sorted(cities))))
    assert len(seen_questions) == sum(map(len, task_of(name).groups(sources, SIZES)))


@pytest.mark.parametrize("name", [*SEEN, "variables"])
def test_a_question_that_scorers_see_is_part_of_what_is_compressed(sources, name):
    """Otherwise it comes behind; the words that the answer begins with always do."""
    question = "Find all variables" if name == "variables" else "What "
    answer = "According to" if name == "variables" else "The special magic number"
    for case in (case for cases in task_of(name).groups(sources, SIZES) for case in cases):
        prompt, behind = text_of(sources, case.prompt), text_of(sources, case.question)
        assert (question in prompt) == SEEN.get(name, True)
        assert (question in behind) != SEEN.get(name, True)
        assert answer in behind
        assert answer not in prompt


def test_a_needle_is_about_as_long_a_prompt_as_was_asked_for(sources):
    """Up to introduction, question and one sentence."""
    for length in (300, 900):
        for (case,) in task_of("needle").groups(sources, TaskSizes(documents=2, length=length)):
            assert length <= len(case.prompt) < length + 150


# -- chains ----------------------------------------------------------------------------------------------------


def test_a_chain_of_variables_is_in_order_and_all_of_it_is_right(sources):
    for (case,) in task_of("variables").groups(sources, SIZES):
        text = text_of(sources, case.prompt)
        assigned = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\. ", text)
        names, values = zip(*assigned, strict=True)
        value = re.search(r"assigned the value (\d{5}) in", text).group(1)
        assert len(set(names)) == 3
        assert values == (value, *names[:-1])
        score = case.scores["correct"]
        assert score(f" {', '.join(names)}.") == 1
        assert score(" ".join(names[:2])) == pytest.approx(2 / 3)
        assert score("ZZZZZ") == 0


# -- all tasks -------------------------------------------------------------------------------------------------


def as_data(groups):
    return [[(case.prompt, getattr(case, "question", None) or case.text) for case in cases] for cases in groups]


@pytest.mark.parametrize("name", [name for name in TASKS if name in SEEN or name in ("text", "variables")])
def test_the_same_seed_gives_the_same_cases_and_another_one_others(plain, name):
    """What text follows is not asked: the seed does not change it."""
    task = task_of(name)
    first, again, other = (as_data(task.groups(plain, TaskSizes(3, 300, 20, 3, seed))) for seed in (4, 4, 5))

    assert first == again
    assert (first != other) == (name != "text")
    assert len({cases[0][0] for cases in first}) == 3


def test_tasks_have_the_names_and_metrics_they_say():
    for name, task in TASKS.items():
        assert task.name == name
        assert task.summary
        assert set(task.metrics) in (
            {"correct"},
            {"correct", "written"},
            {"correct", "prefix"},
            {"correct", "prefix", "written"},
            {"correct", "last"},
            {"kl", "top1", "agreed", "nll"},
        )


def test_unknown_tasks_and_those_of_other_models_are_refused():
    with pytest.raises(EvaluationError, match=r"task: unknown: 'needls'.*needles"):
        require_tasks(["needls"], testbed=False)
    with pytest.raises(EvaluationError, match="task: recall is for the embedded model"):
        require_tasks(["text", "recall"], testbed=False)
    with pytest.raises(EvaluationError, match="task: text is for models that read text"):
        require_tasks(["recall", "text"], testbed=True)
    require_tasks(["recall", "tracking-unseen"], testbed=True)
