"""The project's own blend: attention, redundancy and the norm of values, with budgets per head as in Ada-KV."""

import numpy as np

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.observed import attention, by_largest, pooled, redundancy
from tests.oracles.simulation import Head, softmax
from tests.oracles.test_snapkv import Adaptive


class Blend(Adaptive):
    """0.6 attention - 0.3 redundancy + 0.1 norm of the value, each divided by its largest among the candidates."""

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [0.6 * self.votes(head) - 0.3 * self.alike(head) + 0.1 * self.norms(head) for head in heads]

    def votes(self, head: Head) -> np.ndarray:
        return by_largest(pooled(attention(head).mean(0).max(0)[self.candidates(head)], 7))

    def alike(self, head: Head) -> np.ndarray:
        return by_largest(softmax(redundancy(head, self, spare_first=False))[self.candidates(head)])

    def norms(self, head: Head) -> np.ndarray:
        return by_largest(np.array([np.linalg.norm(head.entries[slot].value) for slot in self.candidates(head)]))


class OfTwo(Blend):
    """Half attention, half redundancy, the same for every head."""

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [0.5 * self.votes(head) - 0.5 * self.alike(head) for head in heads]

    def shares(self, scores: list[np.ndarray], each: int) -> list[int]:
        return [each] * len(scores)


def test_all_three_count_and_heads_compete():
    given = 12, 3, 1, 4
    assert_holds_what_the_oracle_holds(shipped("blend", *given, queries=4), Blend, *given, 4)


def test_attention_and_redundancy_of_packed_keys():
    given = 12, 3, 2, 4
    assert_holds_what_the_oracle_holds(shipped("blend3", *given, queries=4), OfTwo, *given, 4, changes=True)
