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


class Pursuit(RootMeanSquare):
    """Attention Matching by matching pursuit, with plain least squares: candidates for the mass that others leave."""

    per_step, refit_every, drop_below = 1, 1, -7.0
    given_up = 0  # of all heads

    def chosen(self, head: Head, scores: np.ndarray, count: int) -> list[int]:
        if count == len(scores):
            return list(range(count))
        logits = head.logits(head.window)[..., self.candidates(head)].reshape(-1, len(scores))
        matrix = np.exp(logits - logits.max(1, keepdims=True))
        chosen: list[int] = []
        lost: list[int] = []
        for last in (False, False, False, True):
            self.pursue(matrix, chosen, lost, count)
            factors = self.factors(matrix, chosen)
            weak = {index for index, factor in zip(chosen, factors, strict=True) if factor < np.exp(self.drop_below)}
            for factor in factors:
                self.margin = min(self.margin, abs(factor - np.exp(self.drop_below)))
            if last or not weak:
                break
            type(self).given_up += len(weak)
            lost += weak
            chosen = [index for index in chosen if index not in weak]
        rest = [index for index in range(len(scores)) if index not in chosen]
        return sorted(chosen + [rest[index] for index in self.best(scores[rest], count - len(chosen))])

    def pursue(self, matrix: np.ndarray, chosen: list[int], lost: list[int], count: int) -> None:
        steps, left = 0, matrix.sum(1) - matrix[:, chosen] @ self.factors(matrix, chosen)
        while len(chosen) < min(count, matrix.shape[1] - len(lost)):
            worth = left @ matrix
            free = [index for index in range(len(worth)) if index not in chosen + lost]
            order = sorted(free, key=lambda index: (-worth[index], index))
            number = min(self.per_step, count - len(chosen))
            if number < len(order):
                self.decided(worth[free], worth[order[number - 1]], worth[order[number]])
            chosen += order[:number]
            steps += 1
            if steps % self.refit_every == 0:
                left = matrix.sum(1) - matrix[:, chosen] @ self.factors(matrix, chosen)

    def factors(self, matrix: np.ndarray, chosen: list[int]) -> np.ndarray:
        if not chosen:
            return np.zeros(0)
        return np.linalg.lstsq(matrix[:, chosen], matrix.sum(1), rcond=None)[0].clip(1e-12, np.exp(7))


@pytest.mark.parametrize(
    ("every", "changes"),
    [(4, {}), (1, {}), (4, {"per_step": 2, "refit_every": 2}), (4, {"drop_below": -0.1})],
    ids=repr,
)
def test_attention_matching_keeps_what_gives_the_mass_of_all(every, changes):
    """With factors that are too small, too, whose entries are given up for others."""
    given = 11, every, 2, 4
    kind = type("Pursuit", (Pursuit,), {"given_up": 0, **changes})
    select = {"use": "omp", "queries": 4, "per_step": 1, "refit_every": 1, "ridge": 0, **changes}
    policy = shipped("attention_matching_omp", *given, queries=4, select=select)
    assert_holds_what_the_oracle_holds(policy, kind, *given, 4, changes=True)
    assert kind.given_up or "drop_below" not in changes
