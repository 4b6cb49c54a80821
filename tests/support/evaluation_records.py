"""Records that are made by hand."""

import attrs

from kvpolicy.evaluate.harness.record import Cell, EvaluationRecord
from kvpolicy.evaluate.harness.setup import FULL, OTHER_PRECISION

HEAD = {
    "date": "2031-07-19",
    "versions": {"kvpolicy": "71.2", "torch": "72.3", "transformers": "73.4", "python": "74.5"},
    "machine": {"platform": "a planet", "processor": "an abacus", "threads": 75},
    "model": {"name": "a/model", "digest": "d16e57", "parameters": 123456, "dtype": "bfloat16"},
    "texts": {"novel": "aa", "diary": "bb"},
    "sizes": {"documents": 76, "length": 777},
}


def cell(task, group, policy, share, held=None, refusal="", **values):
    """One group of cases; without a place to hold it is the full cache, or holds what it may."""
    held = 1000 * (share or 1) if held is None else held
    return Cell(task, group, policy, share, values, held_bytes=held, full_bytes=1000.0, seconds=90.0, refusal=refusal)


def record_of(*cells, **head):
    return EvaluationRecord({**HEAD, **head}, cells)


def with_peers():
    """Predictions of ours and of two peers, one of which holds everything, and one that was refused."""
    costs = {"prompt_share": 0.26, "end_share": 0.25, "prefill_seconds": 1.5, "step_seconds": 0.025}
    theirs = {"prompt_share": 0.2501, "end_share": 0.31, "prefill_seconds": 2.0, "step_seconds": 0.03}
    peer = {"peer": True, "versions": {"kvpress": "9.8", "torch": "7.6"}}
    cells = [
        attrs.evolve(cell("text", 0, FULL, None, kl=[0, 0, 0]), costs=dict.fromkeys(costs, 1.0)),
        attrs.evolve(cell("text", 0, "ours", 0.25, kl=[0.3, 0.31, 0.32]), costs=costs),
        attrs.evolve(cell("text", 0, "kvpress snapkv", 0.25, kl=[0.2, 0.21, 0.22]), costs=theirs, **peer),
        attrs.evolve(
            cell("text", 0, "kvpress adakv", 0.25, held=1000, kl=[0.1, 0.11, 0.12]),
            costs={**theirs, "prompt_share": 1.0, "end_share": 1.0},
            **peer,
        ),
        attrs.evolve(cell("text", 0, "kvpress kvzip", 0.25, refusal="peer: killed"), peer=True),
    ]
    return record_of(*cells)


def two_tasks():
    """Answers, whose third policy is refused; and predictions, where two policies cannot be told apart."""
    right = {
        (FULL, None): ([1, 1, 1], [1, 1, 1]),
        ("good", 0.25): ([1, 1, 1], [1, 1, 0]),
        ("bad", 0.25): ([0, 0, 0], [0, 0, 0]),
    }
    kl = {
        (FULL, None): [0, 0, 0],
        (OTHER_PRECISION, None): [0.0011, 0.0013, 0.0012],
        ("whole", None): [0.02, 0.04, 0.03],
        ("good", 0.25): [0.33, 0.31, 0.32],
        ("bad", 0.25): [0.32, 0.34, 0.33],
        ("good", 0.125): [0.61, 0.62, 0.615],
        ("bad", 0.125): [2.5, 2.7, 2.6],
    }
    cells = [cell("needle", group, *key, correct=numbers[group]) for group in (0, 1) for key, numbers in right.items()]
    cells.append(cell("needle", 0, "odd", 0.25, refusal="odd: 25% of 9 tokens leaves no room"))
    for group in (0, 1, 2):
        cells += [cell("text", group, *key, kl=[numbers[group]], top1=[0.5]) for key, numbers in kl.items()]
    return record_of(*cells)
