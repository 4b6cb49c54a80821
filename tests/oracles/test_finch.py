"""FINCH (TACL 2024): what the question at the end of the prompt attends to, each of its tokens counting alike."""

import numpy as np

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.observed import attention
from tests.oracles.simulation import Head, Method


class Asked(Method):
    """The mean of the window's attention, that of each query times the number of entries that are older."""

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [self.undiluted(head)[self.candidates(head)] for head in heads]

    def undiluted(self, head: Head) -> np.ndarray:
        given, older = attention(head), []
        for position, _ in head.window:
            older.append(sum(entry.position < position for entry in head.entries))
        return (given * np.array(older)[:, None, None]).mean((0, 1))


def test_what_the_question_attends_to_stays():
    """Compressed while decoding, too, to have more to compare; heads then hold fewer entries than there were tokens."""
    given = 12, 3, 1, 4
    assert_holds_what_the_oracle_holds(shipped("finch", *given, queries=4), Asked, *given, 4)
