"""Budgets over all layers and heads at once, as KVzip divides them (arXiv:2505.23416), with SnapKV's votes.

The candidates with the best votes of the whole model stay, whichever layer and head they are of; a floor is shared out
equally, in whole entries.
"""

import attrs
import pytest

from kvpolicy.policy import Policy
from kvpolicy.spec.policy import Allocate
from kvpolicy_plugins.allocators.global_ranking import GlobalRanking
from kvpolicy_plugins.allocators.uniform_heads import UniformHeads
from kvpolicy_plugins.allocators.uniform_layers import UniformLayers
from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.test_snapkv import Adaptive


class Competing(Adaptive):
    """Ada-KV's rule, with the heads of all layers beside each other."""

    competing = True

    def __init__(self, *given: int, floor: float) -> None:
        super().__init__(*given)
        self.floor = floor


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("every", [1, 3])
def test_the_best_votes_of_all_layers_stay(every, floor):
    given = 12, every, 1, 4
    spec = shipped("adakv", *given, queries=4).spec
    allocate = Allocate(UniformLayers(), UniformHeads(), GlobalRanking(floor))
    policy = Policy(attrs.evolve(spec, allocate=allocate))

    def method(*numbers):
        return Competing(*numbers, floor=floor)

    assert_holds_what_the_oracle_holds(policy, method, *given, 4)
