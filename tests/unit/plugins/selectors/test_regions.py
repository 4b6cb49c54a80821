"""What regions of a request keep."""

import pytest
import torch

from kvpolicy_plugins.selectors.fair import Fair
from kvpolicy_plugins.selectors.whitelist import Whitelist
from tests.support.selecting import selected_by


def kept(selector, scores, count, regions, candidates=None):
    scores = torch.tensor([[scores]])
    inside = torch.ones_like(scores, dtype=torch.bool) if candidates is None else torch.tensor([[candidates]]).bool()
    regions = None if regions is None else torch.tensor([[regions]], dtype=torch.int8)
    chosen = selected_by(selector, scores, inside, torch.tensor([[count]]), regions=regions)
    return chosen[0, 0].nonzero().flatten().tolist()


REGIONS = [1, 1, 1, 1, 2, 2, 0, 0, 0, 0, 0, 0]
SCORES = [0.0, 1, 2, 3, 0, 1, 9, 8, 7, 6, 5, 4]


def test_regions_keep_the_same_share_whatever_they_score():
    assert kept(Fair(), SCORES, 6, REGIONS) == [2, 3, 5, 6, 7, 8]
    assert kept(Fair(), SCORES, 2, REGIONS) == [3, 6]  # 0.67, 0.33 and 1


def test_the_largest_remainder_is_rounded_up_and_of_equal_ones_the_lower_number():
    assert kept(Fair(), [1.0, 1, 1, 1], 1, [2, 2, 1, 1]) == [2]
    assert kept(Fair(), SCORES, 7, REGIONS) == [2, 3, 5, 6, 7, 8, 9]  # 2.33, 1.17 and 3.5


def test_rounded_as_published_the_earlier_of_two_regions_gets_the_floor():
    regions, scores = [1, 1, 1, 2, 2], [1.0, 2, 3, 4, 5]
    assert kept(Fair("cumulative"), scores, 3, regions) == [2, 3, 4]
    assert kept(Fair(), scores, 3, regions) == [1, 2, 4]


def test_protected_entries_are_in_no_share():
    candidates = [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    assert kept(Fair(), SCORES, 4, REGIONS, candidates) == [5, 6, 7, 8]


def test_a_region_may_have_the_largest_number():
    assert kept(Fair(), [1.0, 2, 3, 4], 2, [127, 127, 0, 0]) == [1, 3]


def test_listed_regions_stay_first():
    assert kept(Whitelist(), SCORES, 8, REGIONS) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert kept(Whitelist(), SCORES, 3, REGIONS) == [1, 2, 3]  # as many as fit, by score; ties go to the earlier
    assert kept(Whitelist(), SCORES, 6, REGIONS, [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]) == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("selector", [Fair(), Fair("cumulative"), Whitelist()])
@pytest.mark.parametrize("regions", [None, [0] * 12])
def test_without_regions_the_best_stay(selector, regions):
    assert kept(selector, SCORES, 3, regions) == [6, 7, 8]
