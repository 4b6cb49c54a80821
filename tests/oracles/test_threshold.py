"""Eviction by a threshold (DMS, arXiv:2506.05345; kvpress's DMSPress): what scores less goes, however much that is.

A budget is the most that the heads of a layer hold; the newest entries stay in any case.
"""

import numpy as np
import pytest

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.simulation import Head, Method


class Small(Method):
    """Keys whose norm is at most a limit."""

    limit: float

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [-np.array([np.linalg.norm(head.entries[slot].key) for slot in self.candidates(head)]) for head in heads]

    def shares(self, scores: list[np.ndarray], each: int) -> list[int]:
        ranked = sorted(((-score, head, slot) for head, own in enumerate(scores) for slot, score in enumerate(own)))
        total = each * len(scores)
        if total < len(ranked):
            self.decided(np.concatenate(scores), -ranked[total - 1][0], -ranked[total][0])
        allowed = [(norm, head) for norm, head, _ in ranked[:total] if norm <= self.limit]
        self.margin = min([self.margin, *(abs(norm - self.limit) / self.limit for norm, _, _ in ranked)])
        return [sum(head == index for _, head in allowed) for index in range(len(scores))]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("limit", [3.2, 4.0, 9.0])
def test_what_scores_less_goes_and_the_budget_is_a_cap(every, limit):
    given = 9, every, 1, 4
    allocate = {"layers": "uniform", "heads": {"use": "threshold", "value": -limit}}
    policy = shipped("adakv", *given, score=[{"use": "key_norm"}], allocate=allocate)
    assert_holds_what_the_oracle_holds(policy, type("Small", (Small,), {"limit": limit}), *given)
