"""SnapKV (arXiv:2404.14469), and the two that share its votes: PyramidKV (2406.02069) and Ada-KV (2407.11550).

Votes of a candidate: the probabilities that the last W queries give it, over all that is held, what came after a query
hidden from it; summed over the queries, averaged over the query heads of a KV head; then the largest among it and its
three neighbours on either side.
"""

import numpy as np
import pytest

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.observed import attention, pooled
from tests.oracles.simulation import Head, Method


class Votes(Method):
    """SnapKV."""

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [pooled(attention(head).sum(0).mean(0)[self.candidates(head)], 7) for head in heads]


class Pyramid(Votes):
    """PyramidKV: budgets fall linearly from the first layer to the last, with the same sum.

    The last layer keeps base / beta candidates and the first 2 base less that, base = budget - protected; no more than
    there are, the rest going to the top. Shares are rounded down, the largest remainders up.
    """

    beta = 20

    def entries(self, layer: int, layers: int, tokens: int) -> int:
        protected = self.sinks + self.recent
        base, most = min(self.budget, tokens) - protected, tokens - protected
        bottom = min(2 * base - base / self.beta, most)
        top = 2 * base - bottom
        exact = [bottom + (top - bottom) * index / (layers - 1) for index in range(layers)]
        whole = [int(share + 1e-9) for share in exact]
        largest = sorted(range(layers), key=lambda index: (-round(exact[index] - whole[index], 9), index))
        for index in largest[: base * layers - sum(whole)]:
            whole[index] += 1
        return whole[layer] + protected


class Adaptive(Votes):
    """Ada-KV: a fifth of a layer's candidates is shared out equally, the rest goes to the best votes of all heads."""

    floor = 0.2

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [pooled(attention(head).mean(0).mean(0)[self.candidates(head)], 7) for head in heads]

    def shares(self, scores: list[np.ndarray], each: int) -> list[int]:
        ranked = sorted(((-score, head, slot) for head, own in enumerate(scores) for slot, score in enumerate(own)))
        total = each * len(scores)
        if total < len(ranked):
            self.decided(np.concatenate(scores), -ranked[total - 1][0], -ranked[total][0])
        owned = [sum(head == index for _, head, _ in ranked[:total]) for index in range(len(scores))]
        equal = evenly([len(own) for own in scores], total)
        exact = [(1 - self.floor) * count + self.floor * share for count, share in zip(owned, equal, strict=True)]
        whole = [int(share + 1e-9) for share in exact]
        largest = sorted(range(len(scores)), key=lambda index: (-round(exact[index] - whole[index], 9), index))
        for index in largest[: total - sum(whole)]:
            whole[index] += 1
        return whole


def evenly(rooms: list[int], total: float) -> list[float]:
    """Equal shares; what a head has no room for, the others get."""
    shares: dict[int, float] = {}
    while len(shares) < len(rooms):
        left = [index for index in range(len(rooms)) if index not in shares]
        level = (total - sum(shares.values())) / len(left)
        small = [index for index in left if rooms[index] < level]
        shares |= {index: rooms[index] for index in small} if small else dict.fromkeys(left, level)
    return [shares[index] for index in range(len(rooms))]


@pytest.mark.parametrize("queries", [4, 7])
@pytest.mark.parametrize("every", [1, 4])
def test_snapkv_keeps_what_the_last_queries_vote_for(every, queries):
    given = 14, every, 1, 4
    assert_holds_what_the_oracle_holds(shipped("snapkv", *given, queries=queries), Votes, *given, queries)


def test_pyramidkv_keeps_less_in_every_further_layer():
    given = 12, 3, 0, 4
    assert_holds_what_the_oracle_holds(shipped("pyramidkv", *given, queries=5), Pyramid, *given, 5)


def test_adakv_gives_a_layers_budget_to_the_heads_with_the_best_votes():
    given = 12, 3, 1, 4
    assert_holds_what_the_oracle_holds(shipped("adakv", *given, queries=4), Adaptive, *given, 4)
