"""CAKE (arXiv:2503.12491): layers share the budget by how their attention spreads and shifts.

With the probabilities that the last W queries give the candidates of a layer, in all its query heads: E = the sum of
-p ln p, V = the sum of the variances over the queries, and the layer's share is E^(1/tau1) V^(1/tau2), of the sum of
those of all layers. A layer that would get more than it holds gets that, and the others what is left, by their shares.
Votes: mean plus 200 variances over the queries, averaged over five neighbours, then over the group.
"""

import numpy as np
import pytest

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.observed import attention
from tests.oracles.simulation import Head, Method


class Cake(Method):
    competing = True
    layers, tau1, tau2 = 3, 1.0, 1.0

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        shown = [attention(head)[..., self.candidates(head)] for head in heads]  # [W, G, n]
        size = len(heads) // self.layers
        self.preferences = []
        for first in range(0, len(heads), size):
            own = shown[first : first + size]
            entropy = sum(-(p * np.log(p + 1e-10)).sum() for p in own)
            variance = sum(p.var(0, ddof=1).sum() for p in own)
            self.preferences.append(entropy ** (1 / self.tau1) * variance ** (1 / self.tau2))
        votes = [p.mean(0) + 200 * p.var(0, ddof=1) for p in shown]
        return [np.mean([averaged(head) for head in own], 0) for own in votes]

    def shares(self, scores: list[np.ndarray], each: int) -> list[int]:
        size, rooms = len(scores) // self.layers, [len(own) for own in scores[:: len(scores) // self.layers]]
        exact = divided(self.preferences, rooms, each * self.layers)
        whole = [int(share + 1e-9) for share in exact]
        rest = [share - count for share, count in zip(exact, whole, strict=True)]
        largest = sorted(range(self.layers), key=lambda layer: (-rest[layer], layer))
        missing = each * self.layers - sum(whole)
        if missing:
            self.margin = min(self.margin, abs(rest[largest[missing - 1]] - rest[largest[missing]]))
        for layer in largest[:missing]:
            whole[layer] += 1
        return [count for count in whole for _ in range(size)]


def divided(weights: list[float], rooms: list[int], total: int) -> list[float]:
    """By weights; what has no room goes to the others."""
    shares: dict[int, float] = {}
    while len(shares) < len(rooms):
        left = [index for index in range(len(rooms)) if index not in shares]
        level = (total - sum(shares.values())) / sum(weights[index] for index in left)
        small = {index: float(rooms[index]) for index in left if rooms[index] < weights[index] * level}
        shares |= small or {index: weights[index] * level for index in left}
    return [shares[index] for index in range(len(rooms))]


def averaged(scores: np.ndarray) -> np.ndarray:
    return np.array([scores[max(0, at - 2) : at + 3].sum() / 5 for at in range(len(scores))])


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (1.6, 0.4)])
def test_layers_whose_attention_spreads_and_shifts_keep_more(every, temperatures):
    given = 14, every, 1, 4
    kind = type("Tempered", (Cake,), dict(zip(("tau1", "tau2"), temperatures, strict=True)))
    policy = shipped("cake", *given, queries=5, tau1=temperatures[0], tau2=temperatures[1])
    assert_holds_what_the_oracle_holds(policy, kind, *given, 5)
