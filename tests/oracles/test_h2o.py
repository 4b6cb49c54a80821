"""H2O (arXiv:2306.14048): what received most attention so far, and the newest.

A = sum over all queries so far, those of the prompt among them, of the probability that they gave the entry, averaged
over the query heads of a KV head. An entry that stays keeps its A; a new one begins with what its own query gave it.
"""

import numpy as np
import pytest

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.simulation import Head, Method


class HeavyHitters(Method):
    """Most attention received, summed over all forwards."""

    def observe(self, head: Head, probabilities: np.ndarray) -> None:
        for row in probabilities:
            for index, entry in enumerate(head.entries):
                entry.received += row[:, index].mean()

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [np.array([head.entries[slot].received for slot in self.candidates(head)]) for head in heads]


@pytest.mark.parametrize("every", [1, 3])
def test_the_heavy_hitters_of_the_prompt_and_after_it_stay(every):
    given = 10, every, 0, 5
    assert_holds_what_the_oracle_holds(shipped("h2o", *given), HeavyHitters, *given)
