"""Which policies another one is better than, wherever both were measured."""

import pytest

from kvpolicy.evaluate.harness.record import Cell, EvaluationRecord
from kvpolicy.evaluate.report.dominated import dominated

CASES = 4


def cell(task, policy, value, held, share=0.25):
    metric = "kl" if task == "text" else "correct"
    values = {metric: [value + 0.001 * case for case in range(CASES)]}
    return Cell(
        task=task,
        group=0,
        policy=policy,
        share=share,
        digest=None,
        fitted=None,
        prompt_tokens=10,
        values=values,
        held_bytes=held,
        full_bytes=100.0,
        seconds=1.0,
    )


def record(*cells):
    full = [cell("text", "full cache", 0.0, 100.0, None), cell("needles", "full cache", 0.9, 100.0, None)]
    return EvaluationRecord({}, (*full, *cells))


def test_a_policy_is_dominated_by_one_that_is_nowhere_worse_and_somewhere_better():
    ours = [cell("text", "good", 0.1, 25.0), cell("needles", "good", 0.5, 25.0)]
    theirs = [cell("text", "poor", 0.2, 25.0), cell("needles", "poor", 0.5, 25.0)]

    assert dominated(record(*ours, *theirs)) == {"poor": "good"}
    assert dominated(record(*ours, *theirs), among=["poor"]) == {}


@pytest.mark.parametrize(
    "changed",
    [
        cell("needles", "poor", 0.6, 25.0),  # better there
        cell("text", "poor", 0.1, 25.0),  # as good
        cell("text", "poor", 0.2, 24.0),  # holds less
        cell("text", "poor", 0.2, 12.5, 0.125),  # where the other was not measured
    ],
)
def test_otherwise_it_is_not(changed):
    cells = [
        cell("text", "good", 0.1, 25.0),
        cell("needles", "good", 0.5, 25.0),
        cell("text", "poor", 0.2, 25.0),
        cell("needles", "poor", 0.5, 25.0),
    ]
    kept = [one for one in cells if (one.task, one.policy, one.share) != (changed.task, changed.policy, changed.share)]
    assert "poor" not in dominated(record(*kept, changed))


def test_a_policy_without_a_share_is_compared_with_what_holds_no_more():
    whole = cell("text", "packed", 0.2, 27.0, None)
    ours = [cell("text", "good", 0.1, 25.0), cell("text", "good", 0.5, 12.5, 0.125)]
    assert dominated(record(whole, *ours)) == {"packed": "good"}
    assert dominated(record(whole, ours[1])) == {}
    assert dominated(record(whole, cell("text", "good", 0.1, 40.0, None))) == {}


def test_what_the_full_cache_cannot_do_decides_nothing():
    undone = [cell("variables", "full cache", 0.1, 100.0, None), cell("variables", "poor", 0.3, 25.0)]
    ours = [cell("text", "good", 0.1, 25.0), cell("variables", "good", 0.0, 25.0)]
    assert dominated(record(*undone, *ours, cell("text", "poor", 0.2, 25.0))) == {"poor": "good"}
