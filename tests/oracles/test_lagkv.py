"""LagKV (arXiv:2504.04704): entries that vary little on the scale of the entries that follow them go."""

from itertools import pairwise

import numpy as np
import pytest

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.simulation import Entry, Head, Method, softmax

LAG, SINKS = 4, 4


class Varied(Method):
    """Partitions of four entries behind four sinks, each beside the next one; without `CROSS` by ranks."""

    CROSS = False

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [np.array(self.worth(head.entries))[self.candidates(head)] for head in heads]

    def worth(self, entries: list[Entry]) -> list[float]:
        behind = entries[SINKS:]
        partitions = [behind[start : start + LAG] for start in range(0, len(behind) - LAG + 1, LAG)]
        if len(partitions) < 2:
            return [1.0] * SINKS + [place / len(behind) for place in range(len(behind))]
        found = [1.0] * SINKS
        for own, following in pairwise(partitions):
            shares = [self.spread(own, following, part) for part in ("key", "value")]
            mean = np.mean(shares, axis=0)
            found += list(mean) if self.CROSS else self.ranks(mean)
        return found + [1.0] * (len(entries) - len(found))

    def spread(self, own: list[Entry], following: list[Entry], part: str) -> np.ndarray:
        reference = np.stack([getattr(entry, part) for entry in following])
        low, high = reference.min(0), reference.max(0)
        return softmax(np.array([np.std((getattr(entry, part) - low) / (high - low), ddof=1) for entry in own]))

    def ranks(self, scores: np.ndarray) -> list[float]:
        self.margin = min(self.margin, np.diff(np.sort(scores)).min())
        return [sum(other < score for other in scores) / LAG for score in scores]


class VariedAmongAll(Varied):
    """Partitions compete with each other."""

    CROSS = True


@pytest.mark.parametrize("kind", [Varied, VariedAmongAll])
@pytest.mark.parametrize("every", [2, 6])
def test_entries_that_vary_little_go(kind, every):
    given = 16, every, SINKS, 0
    policy = shipped("lagkv", *given, lag=LAG, cross=kind.CROSS)
    assert_holds_what_the_oracle_holds(policy, kind, *given)
