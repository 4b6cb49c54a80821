"""KeyDiff (arXiv:2504.15364): keys that point where most keys of their head point go."""

import numpy as np

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.simulation import Head, Method


class Unlike(Method):
    """Minus the cosine to the mean of all unit keys that the head holds."""

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [self.apart(head)[self.candidates(head)] for head in heads]

    def apart(self, head: Head) -> np.ndarray:
        directions = [entry.key / np.linalg.norm(entry.key) for entry in head.entries]
        anchor = np.mean(directions, axis=0)
        return np.array([-(each @ anchor) / np.linalg.norm(anchor) for each in directions])


def test_keys_like_the_others_go():
    given = 12, 4, 0, 0
    assert_holds_what_the_oracle_holds(shipped("keydiff", *given), Unlike, *given)


def test_protected_keys_count_for_the_anchor():
    given = 12, 1, 2, 4
    assert_holds_what_the_oracle_holds(shipped("keydiff", *given), Unlike, *given)
