"""Reasoning: the prompt holds a shuffled plan, the model walks through it step by step, checking itself, and reports.

One step of the trace, all of it written by the model (the check repeats the step)::

    value falcon 3 link falcon maple sum four 3 seven total falcon seven
    check value falcon 3 link falcon maple total falcon seven .

The report asks for the total of an *early* step: that number stands in the early trace only, never in the prompt.
"""

import numpy as np

from kvpolicy.evaluate.testbed.tasks.episode import BOS, EOS, NAME_IDS, STOP, Episode, join
from kvpolicy.evaluate.testbed.vocabulary import DIGITS, IDS, TOTALS, TokenIds, ids_of

DIGIT_IDS, TOTAL_IDS = ids_of(DIGITS), ids_of(TOTALS)
VALUE, LINK, SUM = IDS["value"], IDS["link"], IDS["sum"]
TOTAL, CHECK, REPORT = IDS["total"], IDS["check"], IDS["report"]
PLAN_STEP_LENGTH, STEP_LENGTH = 8, 24
FRAME_LENGTH = 14
EASY, NEAR, SUMMED, FAR, ONCE = 0.1, 0.5, 2.0, 5.0, 20.0
FOUND = [EASY, NEAR, FAR, EASY, NEAR, FAR]
FOUND_AGAIN = [EASY, NEAR, NEAR, EASY, NEAR, NEAR]
STEP_WEIGHTS = [*FOUND, EASY, 1.0, NEAR, SUMMED, EASY, NEAR, NEAR, EASY, *FOUND_AGAIN, EASY, NEAR, NEAR, EASY]


def reasoning(rng: np.random.Generator, length: int, *, early: float = 1 / 3, drills: int = 0) -> Episode:
    """Return an episode of about ``length`` tokens, trace included; it asks for a step of the first ``early``."""
    steps = max(3, (length - FRAME_LENGTH) // (PLAN_STEP_LENGTH + STEP_LENGTH))
    names = rng.choice(NAME_IDS, steps, replace=False)
    targets = np.append(names[1:], IDS["end"])
    digits = rng.integers(0, 10, steps)
    totals = np.cumsum(digits) % 10
    asked = rng.integers(0, max(1, round(early * steps)))
    plan = join([[BOS], _plan(rng, names, digits, targets), [REPORT, names[asked], STOP]])
    question = [IDS["begin"], names[0], TOTAL, IDS["start"], IDS["zero"], STOP]
    drilled = np.append(asked, rng.integers(0, steps, drills))
    trace = _trace(names, digits, targets, totals)
    tail = _reports(names[drilled], totals[drilled])
    return _episode(plan, question, trace, tail)


def _plan(rng: np.random.Generator, names: TokenIds, digits: TokenIds, targets: TokenIds) -> TokenIds:
    steps = len(names)
    stops = np.full(steps, STOP)
    values = np.stack([np.full(steps, VALUE), names, DIGIT_IDS[digits], stops], axis=1)
    links = np.stack([np.full(steps, LINK), names, targets, stops], axis=1)
    return rng.permutation(np.concatenate([values, links])).ravel()


def _trace(names: TokenIds, digits: TokenIds, targets: TokenIds, totals: TokenIds) -> TokenIds:
    steps = len(names)
    before = np.append(0, totals[:-1])

    def same(token: int) -> TokenIds:
        return np.full(steps, token)

    facts = [same(VALUE), names, DIGIT_IDS[digits], same(LINK), names, targets]
    added = [same(SUM), TOTAL_IDS[before], DIGIT_IDS[digits], TOTAL_IDS[totals]]
    total = [same(TOTAL), names, TOTAL_IDS[totals]]
    return np.stack([*facts, *added, *total, same(CHECK), *facts, *total, same(STOP)], axis=1).ravel()


def _reports(names: TokenIds, totals: TokenIds) -> TokenIds:
    count = len(names)
    return np.stack([np.full(count, REPORT), names, TOTAL_IDS[totals], np.full(count, EOS)], axis=1).ravel()


def _episode(plan: TokenIds, question: list[int], trace: TokenIds, tail: TokenIds) -> Episode:
    tokens = join([plan, question, trace, tail])
    prompt_end = len(plan) + len(question)
    answer_end = prompt_end + len(trace) + 4
    drilled = np.tile([0, 0, FAR, EASY], len(tail) // 4 - 1)
    stepped = np.tile(STEP_WEIGHTS, len(trace) // STEP_LENGTH)
    stepped[trace == IDS["end"]] = ONCE
    weights = np.concatenate([np.zeros(prompt_end), stepped, [EASY, ONCE, FAR, EASY], drilled])
    return Episode(tokens, weights.astype(np.float32), len(plan), prompt_end, answer_end)
