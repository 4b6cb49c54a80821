"""KVCrush (arXiv:2503.00022): blocks by score, and a few of the others for how they differ from an anchor."""

import numpy as np
import pytest

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.drawing import hashed
from tests.oracles.observed import attention
from tests.oracles.simulation import Head, Method

SIZE, SEED = 2, 3


class Crushed(Method):
    """Votes of the window as in SnapKV, without pooling; whole blocks stay, then single candidates."""

    anchor = "mean"
    representatives = 2

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [attention(head).sum(0).mean(0)[self.candidates(head)] for head in heads]

    def chosen(self, head: Head, scores: np.ndarray, count: int) -> list[int]:
        blocks = [list(range(start, min(start + SIZE, len(scores)))) for start in range(0, len(scores), SIZE)]
        whole = min(count // SIZE, len(blocks))
        represented = min(self.representatives, whole, len(blocks) - whole)
        best = self.best(np.array([scores[block].mean() for block in blocks]), whole - represented)
        half = self.best(scores, len(scores) // 2)
        bits = [[index in half for index in block] for block in blocks]
        anchor = self.pattern(head, bits)
        others = [number for number in range(len(blocks)) if number not in best]
        others.sort(key=lambda number: (sum(bit != anchor[j] for j, bit in enumerate(bits[number])), number))
        stay = best
        if represented:
            step = len(others) // represented
            stay = best + [others[rank * step] for rank in range(represented)]
        kept = [index for number in stay for index in blocks[number]]
        rest = [index for index in range(len(scores)) if index not in kept]
        return sorted(kept + [rest[index] for index in self.best(scores[rest], count - len(kept))])

    def pattern(self, head: Head, bits: list[list[bool]]) -> list[bool]:
        if self.anchor == "random":
            newest = head.entries[-1].position
            return [hashed(SEED, head.layer, newest, place) % 2 == 1 for place in range(SIZE)]
        if self.anchor == "alternating":
            return [place % 2 == 1 for place in range(SIZE)]
        if self.anchor in ("zeros", "ones"):
            return [self.anchor == "ones"] * SIZE
        columns = [[own[place] for own in bits if place < len(own)] for place in range(SIZE)]
        return [sum(column) > len(column) / 2 for column in columns]


@pytest.mark.parametrize("anchor", ["mean", "zeros", "ones", "alternating", "random"])
def test_some_blocks_stay_for_what_the_others_look_like(anchor):
    given = 15, 2, 1, 4
    select = {"use": "kvcrush", "size": SIZE, "representatives": 2, "anchor": anchor, "seed": SEED}
    kind = type("Crushed", (Crushed,), {"anchor": anchor})
    assert_holds_what_the_oracle_holds(shipped("kvcrush", *given, queries=4, select=select), kind, *given, 4)
