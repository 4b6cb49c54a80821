"""StreamingLLM (arXiv:2309.17453): the first tokens of a row, and the last; nothing of its contents matters."""

import numpy as np
import pytest

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.simulation import Head, Method


class Newest(Method):
    """The later, the better."""

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [np.array([head.entries[slot].position for slot in self.candidates(head)], float) for head in heads]


@pytest.mark.parametrize("given", [(12, 1, 3, 9), (12, 1, 3, 5), (9, 4, 2, 7)])
def test_sinks_and_the_newest_stay(given):
    assert_holds_what_the_oracle_holds(shipped("streaming_llm", *given), Newest, *given)
