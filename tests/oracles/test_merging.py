"""Which entries stay where others are merged: D2O (arXiv:2406.13035), KeepKV (2504.09936), AM (2602.16284).

Merging changes keys and values; what it made of them is taken from the cache, so that this is about the selection.
"""

import numpy as np
import pytest

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.observed import attention
from tests.oracles.simulation import Head, Method, softmax
from tests.oracles.test_h2o import HeavyHitters


class Attended(Method):
    """KeepKV: the mean over the window's queries and the group of the attention that an entry gets, all its votes."""

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [attention(head).mean((0, 1))[self.candidates(head)] for head in heads]


@pytest.mark.parametrize("every", [1, 4])
def test_d2o_keeps_heavy_hitters_between_sinks_and_recent(every):
    given = 12, every, 2, 4
    assert_holds_what_the_oracle_holds(shipped("d2o", *given), HeavyHitters, *given, changes=True)


@pytest.mark.parametrize("threshold", [0.8, -1.0])
def test_keepkv_keeps_what_the_window_attends_to(threshold):
    given = 12, 2, 2, 5
    policy = shipped("keepkv", *given, queries=5, threshold=threshold)
    assert_holds_what_the_oracle_holds(policy, Attended, *given, 5, changes=True)


class RootMeanSquare(Method):
    """Attention Matching: the root mean square of the probabilities, over the candidates, of all queries of a head."""

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        found = []
        for head in heads:
            probabilities = softmax(head.logits(head.window)[..., self.candidates(head)])
            found.append(np.sqrt((probabilities**2).mean((0, 1))))
        return found


@pytest.mark.parametrize("every", [1, 4])
def test_attention_matching_keeps_what_some_queries_attend_to(every):
    given = 12, every, 2, 4
    policy = shipped("attention_matching", *given, queries=4)
    assert_holds_what_the_oracle_holds(policy, RootMeanSquare, *given, 4, changes=True)
