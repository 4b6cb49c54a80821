"""G-KV (arXiv:2512.00504): the window's attention, joined with what it was in earlier rounds, against redundancy."""

import numpy as np
import pytest

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.observed import attention, by_largest, redundancy
from tests.oracles.simulation import Head, Method, softmax


class Remembering(Method):
    """0.5 F' - 0.5 R.

    F: probabilities over all that is held, the largest of the group for each query, the mean over the queries, divided
    by the largest of the head's candidates. F' = max(0.8 of what the entry had in the last round that it was a
    candidate in, F), and F for one that never was. R as in R-KV, with nobody to forgive where nobody is alike,
    divided by the largest of the candidates.
    """

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [0.5 * self.joined(head) - 0.5 * self.alike(head) for head in heads]

    def joined(self, head: Head) -> np.ndarray:
        slots = self.candidates(head)
        fresh = by_largest(attention(head).max(1).mean(0)[slots])
        for slot, score in zip(slots, fresh, strict=True):
            entry = head.entries[slot]
            entry.remembered = score if entry.remembered is None else max(0.8 * entry.remembered, score)
        return np.array([head.entries[slot].remembered for slot in slots])

    def alike(self, head: Head) -> np.ndarray:
        return by_largest(softmax(redundancy(head, self, spare_first=False))[self.candidates(head)])


@pytest.mark.parametrize("given", [(12, 4, 0, 4), (12, 1, 2, 3)])
def test_scores_of_earlier_rounds_count(given):
    assert_holds_what_the_oracle_holds(shipped("gkv", *given, queries=4), Remembering, *given, 4)
