"""The order of comparison."""

import torch

from kvpolicy.stages.ordering import best_first
from kvpolicy_plugins.selectors.topk import TopK
from tests.support.selecting import selected_by


def test_every_kind_of_number_has_its_place():
    scores = torch.tensor([torch.nan, -torch.inf, -1, -0.0, 0.0, 1e-45, 1, torch.inf, torch.inf])
    candidates = torch.ones(9, dtype=torch.bool)
    candidates[8] = False
    assert best_first(scores, candidates).tolist() == [7, 6, 5, 3, 4, 2, 1, 0, 8]


def test_heads_may_keep_different_numbers():
    scores = torch.tensor([[[1.0, 3, 2], [5, 5, 5]]])
    kept = selected_by(TopK(), scores, torch.ones(1, 2, 3, dtype=torch.bool), torch.tensor([[1, 2]]))
    assert kept.tolist() == [[[False, True, False], [True, True, False]]]
