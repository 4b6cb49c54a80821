"""Random Attention (arXiv:2609.03430): the prompt and the newest stay, of the rest what draws the largest."""

import numpy as np
import pytest

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.drawing import hashed
from tests.oracles.simulation import Head, Method

SEED = 7


class Drawn(Method):
    """A number for each entry, by seed, layer, head, newest position and its own; the prompt is never compressed."""

    prefill = False

    def candidates(self, head: Head) -> list[int]:
        return list(range(head.prompt, len(head.entries) - self.recent))

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [np.array([self.draw(head, slot) for slot in self.candidates(head)]) for head in heads]

    def draw(self, head: Head, slot: int) -> float:
        words = SEED, head.layer, head.number, head.entries[-1].position, head.entries[slot].position
        return hashed(*words) // 2**8 / 2**24


@pytest.mark.parametrize("every", [1, 2])
def test_the_prompt_stays_and_what_is_generated_is_drawn(every):
    given = 26, every, 0, 2
    assert_holds_what_the_oracle_holds(shipped("random", *given, seed=SEED), Drawn, *given)
