"""Shares of heads that cannot hold what they would get."""

import torch

from kvpolicy_plugins.allocators.adaptive import Adaptive
from kvpolicy_plugins.allocators.shared.apportion import apportion, water_fill
from tests.support.allocating import counts_of


def test_a_head_with_few_candidates_leaves_the_rest_to_the_others():
    scores = torch.rand(1, 3, 10, generator=torch.Generator().manual_seed(0))
    candidates = torch.arange(10) < torch.tensor([[[2], [10], [10]]])
    for floor in (0.0, 0.2, 1.0):
        counts = counts_of(Adaptive(floor), scores, candidates, torch.tensor([20]))[0]
        assert counts.sum() == 20
        assert counts[0] <= 2


def test_ties_go_to_the_lower_head():
    even = torch.zeros(1, 2, 4)
    counts = counts_of(Adaptive(0), even, torch.ones_like(even, dtype=torch.bool), torch.tensor([5]))
    assert counts.tolist() == [[4, 1]]


def test_negative_scores_have_a_mass_too():
    scores = torch.tensor([[[-1.0, -9, -9, -9], [-2, -2.5, -3, -3]]])
    everywhere = torch.ones_like(scores, dtype=torch.bool)
    lifted = counts_of(Adaptive(0, "mass"), scores + 9, everywhere, torch.tensor([4]))
    assert torch.equal(counts_of(Adaptive(0, "mass"), scores, everywhere, torch.tensor([4])), lifted)


def test_shares_of_large_budgets_stay_exact():
    total = torch.tensor([10_000_001])
    room = torch.full((1, 3), 2**24)
    assert apportion(water_fill(room, total), total).tolist() == [[3_333_334, 3_333_334, 3_333_333]]
