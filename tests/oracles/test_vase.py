"""VaSE-AttnV (arXiv:2606.03928): the widest values stay, the others are drawn by attention.

Attention: the probabilities that the last W queries give the candidates, over these alone; their mean; the mean of each
candidate and two neighbours on either side, where outside counts as 0; the mean over the query heads.
"""

import numpy as np
import pytest

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.drawing import hashed
from tests.oracles.simulation import Head, Method, softmax

SEED, SINKS = 5, 2


class Sampled(Method):
    """A quarter of all that is held by the range of the value, the first two tokens among them; the rest is drawn."""

    prefill = False

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [self.attention(head) for head in heads]

    def attention(self, head: Head) -> np.ndarray:
        own = softmax(head.logits(head.window)[..., self.candidates(head)]).mean(0)
        padded = np.pad(own, ((0, 0), (2, 2)))
        return np.mean([padded[:, start : start + own.shape[1]] for start in range(5)], axis=0).mean(0)

    def chosen(self, head: Head, scores: np.ndarray, count: int) -> list[int]:
        entries = [head.entries[slot] for slot in self.candidates(head)]
        first = [index for index, entry in enumerate(entries) if entry.position < SINKS]
        others = [index for index in range(len(entries)) if index not in first]
        held = count + len(head.entries) - len(entries)
        wide = self.best(np.array([np.ptp(entries[index].value) for index in others]), held // 4 - len(first))
        reserved = [*first, *(others[index] for index in wide)]
        left = [index for index in others if index not in reserved]
        keys = np.array([np.log(scores[index]) - np.log(self.draw(head, entries[index].position)) for index in left])
        return [*reserved, *(left[index] for index in self.best(keys, count - len(reserved)))]

    def draw(self, head: Head, position: int) -> float:
        word = hashed(SEED, 1, head.layer, head.number, head.entries[-1].position, position)
        return -np.log((word // 2**9 + 0.5) / 2**23)


@pytest.mark.parametrize("every", [1, 3])
def test_wide_values_stay_and_the_rest_is_drawn_by_attention(every):
    given = 14, every, 0, 3
    select = {"use": "sample", "reserve": 0.25, "sinks": SINKS, "seed": SEED}
    assert_holds_what_the_oracle_holds(shipped("vase", *given, queries=4, select=select), Sampled, *given, 4)
