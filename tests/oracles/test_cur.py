"""CurDKV (arXiv:2509.15038) and VaSE-DKV (arXiv:2606.03928): keys and values of small norm go."""

import numpy as np
import pytest

from tests.oracles.comparison import SHORT, assert_holds_what_the_oracle_holds, shipped
from tests.oracles.drawing import gaussians
from tests.oracles.simulation import Entry, Head, Method

BLOCK, RANK = 5, 3


class Norms(Method):
    """The product of the squared norms of key and value, each a share of its block of five."""

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [self.worth(head.entries)[self.candidates(head)] for head in heads]

    def worth(self, entries: list[Entry]) -> np.ndarray:
        found: list[float] = []
        for start in range(0, len(entries), BLOCK):
            block = entries[start : start + BLOCK]
            keys, values = ([np.sum(getattr(entry, part) ** 2) for entry in block] for part in ("key", "value"))
            found += [self.combined(k / sum(keys), v / sum(values)) for k, v in zip(keys, values, strict=True)]
        return np.array(found) / sum(found)

    def combined(self, key: float, value: float) -> float:
        return key * value


class NormsOfKeys(Norms):
    """The keys' share alone."""

    def combined(self, key: float, value: float) -> float:
        return key


class NormsOfBoth(Norms):
    """The mean of both shares."""

    def combined(self, key: float, value: float) -> float:
        return (key + value) / 2


class Sketched(Method):
    """The product of the squared norms of three random projections of key and value, drawn at each eviction."""

    layer = 0

    def entries(self, layer: int, layers: int, tokens: int) -> int:
        self.layer = layer
        return super().entries(layer, layers, tokens)

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        newest = max(head.entries[-1].position for head in heads)
        drawn = gaussians(7, self.layer, newest, len(heads[0].entries[0].key), RANK)
        return [self.worth(head.entries, drawn)[self.candidates(head)] for head in heads]

    def worth(self, entries: list[Entry], drawn: np.ndarray) -> np.ndarray:
        found = [np.sum((entry.key @ drawn) ** 2) * np.sum((entry.value @ drawn) ** 2) for entry in entries]
        return np.array(found) / sum(found)


@pytest.mark.parametrize(("leverage", "kind"), [("product", Norms), ("key", NormsOfKeys), ("average", NormsOfBoth)])
def test_entries_of_small_norm_go(leverage, kind):
    given = 9, 2, 2, 1
    policy = shipped("curkv", *given, leverage=leverage, window=BLOCK)
    assert_holds_what_the_oracle_holds(policy, kind, *given, sizes=SHORT)


def test_entries_of_small_norm_in_a_random_sketch_go():
    given = 12, 2, 4, 3
    policy = shipped("vase_dkv", *given, rank=RANK, seed=7)
    assert_holds_what_the_oracle_holds(policy, Sketched, *given)
