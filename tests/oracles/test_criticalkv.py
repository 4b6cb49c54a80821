"""CriticalKV and CriticalAdaKV (arXiv:2502.03805): half by SnapKV's votes, the rest by what values do to the output.

What a value does: its product with the part of the output projection that a query head has, the sum of the magnitudes
over the channels, the mean over the query heads of its KV head.
"""

import numpy as np
import pytest

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.observed import attention, pooled
from tests.oracles.simulation import Head, Method
from tests.oracles.test_snapkv import Adaptive
from tests.support.models import model

EPSILON = 1e-4


class Critical(Method):
    """In two stages."""

    first_stage = 0.5

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [pooled(attention(head).mean(0).mean(0)[self.candidates(head)], 7) for head in heads]

    def chosen(self, head: Head, scores: np.ndarray, count: int) -> list[int]:
        entries = [head.entries[slot] for slot in self.candidates(head)]
        first = self.best(scores, int(count * self.first_stage))
        rest = [index for index in range(len(scores)) if index not in first]
        worth = np.array([(scores[index] + EPSILON) * added(head, entries[index].value) for index in rest])
        return sorted([*first, *(rest[index] for index in self.best(worth, count - len(first)))])


class CriticalAdaptive(Critical, Adaptive):
    """With the budgets of Ada-KV, which follow from the votes."""


def added(head: Head, value: np.ndarray) -> float:
    """Mean of ‖v W_g‖₁ over the query heads of a KV head."""
    weight = model().model.layers[head.layer].self_attn.o_proj.weight.detach().double().numpy()  # [C, H·D]
    size, group = len(value), model().config.num_attention_heads // model().config.num_key_value_heads
    total = 0.0
    for query_head in range(head.number * group, (head.number + 1) * group):
        for channel in weight:
            total += abs(value @ channel[query_head * size : (query_head + 1) * size])
    return total / group


@pytest.mark.parametrize("every", [1, 4])
def test_criticalkv_keeps_what_changes_the_output(every):
    given = 14, every, 1, 4
    assert_holds_what_the_oracle_holds(shipped("criticalkv", *given, queries=4), Critical, *given, 4)


def test_criticaladakv_does_so_within_the_budgets_of_heads():
    given = 12, 3, 1, 4
    assert_holds_what_the_oracle_holds(shipped("criticaladakv", *given, queries=4), CriticalAdaptive, *given, 4)
