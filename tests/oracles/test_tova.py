"""TOVA (arXiv:2401.06104): what the newest query attends to least goes, the same in all heads of a layer."""

import numpy as np

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.observed import attention
from tests.oracles.simulation import Head, Method


class LeastAttended(Method):
    """The newest query's probabilities over all that is held, averaged over all query heads."""

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        mean = np.mean([attention(head)[-1].mean(0) for head in heads], axis=0)
        return [mean[self.candidates(head)] for head in heads]


def test_what_the_newest_query_attends_to_least_goes():
    given = 12, 1, 0, 0
    assert_holds_what_the_oracle_holds(shipped("tova", *given), LeastAttended, *given)
