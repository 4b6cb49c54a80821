"""Who is nearest, and sums over groups."""

import pytest
import torch
from torch.testing import assert_close

from kvpolicy_plugins.mergers.shared.merge_groups import (
    count_by_target,
    evicted_of,
    groups_of,
    kept_index,
    logsumexp_by_target,
    nearest,
    reaches,
    sum_by_target,
)
from tests.support.views import view_of

PLANE = torch.tensor([[1.0, 0], [3, 0], [0, 2], [2, 1], [0, 0], [-1, 0]])[None, None]  # one head, six slots


def one_head(*slots):
    return torch.tensor([[slots]])


@pytest.mark.parametrize("block", [1, 2, 512])
def test_the_nearest_is_the_first_of_equals(block):
    kept, evicted = one_head(0, 1, 2, -1), torch.tensor([[[False, False, False, True, True, True]]])
    similarity, place = nearest(PLANE, kept, evicted, block=block)
    assert place.tolist() == [[[0, 0, 0, 0, 0, 2]]]
    assert_close(similarity, torch.tensor([[[-torch.inf] * 3 + [2 * 5**-0.5, 0, 0]]]))


def test_a_tiny_key_is_hardly_like_any():
    similarity, _ = nearest(1e-9 * PLANE, one_head(0), torch.arange(6)[None, None] == 1)
    assert_close(similarity[0, 0, 1].item(), 3e-6, atol=0, rtol=1e-5)


@pytest.mark.parametrize("kept", [torch.empty(1, 1, 0, dtype=torch.int64), one_head(-1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_nothing_is_kept_nothing_is_near(kept, dtype):
    similarity, place = nearest(PLANE.to(dtype), kept, torch.ones(1, 1, 6, dtype=torch.bool))
    assert torch.equal(similarity, torch.full((1, 1, 6), -torch.inf, dtype=dtype))
    assert not place.any()


@pytest.mark.parametrize(
    ("threshold", "found"), [(-1, [False, True, True, True]), (-0.5, [False, False, True, True]), (0.9, [False] * 4)]
)
def test_at_a_threshold_of_minus_one_rounding_separates_nothing(threshold, found):
    assert reaches(torch.tensor([-torch.inf, -1.0000001, -0.5, 0.8]), threshold).tolist() == found


def test_evicted_is_what_is_held_and_not_kept():
    view = view_of(torch.zeros(1, 2, 4, 2), lengths=torch.tensor([[4, 2]]))
    evicted = evicted_of(view, torch.tensor([[[0, 3], [1, -1]]]))
    assert evicted.tolist() == [[[False, True, True, False], [True, False, False, False]]]


def test_groups_are_the_kept_and_what_joins_them():
    kept = one_head(1, 4, -1)
    joins = torch.tensor([[[True, False, False, True, False]]])
    groups = groups_of(kept, joins, one_head(1, 0, 0, 1, 0))
    assert kept_index(kept, 5).tolist() == [[[-1, 0, -1, -1, 1]]]
    assert groups.target.tolist() == [[[1, 0, 0, 1, 1]]]
    assert groups.member.tolist() == [[[True, True, False, True, True]]]
    assert groups.merged.tolist() == [[[False, True, False]]]


def test_sums_go_to_their_targets():
    weights, target = torch.tensor([[[1.0, 2, 0, 4, 1, 1]]]), one_head(0, 0, 2, 2, 2, 0)
    assert count_by_target(weights, target, 3).tolist() == [[[4, 0, 5]]]
    sums = sum_by_target(weights, PLANE.bfloat16(), target, 3)
    assert sums.dtype == torch.float32
    assert sums.tolist() == [[[[6, 0], [0, 0], [8, 4]]]]


def test_logarithms_of_sums_neither_overflow_nor_become_nan():
    values = torch.tensor([[[[900.0, 900, -900, -900, -torch.inf, -torch.inf]]]])
    sums = logsumexp_by_target(values, one_head(0, 0, 1, 1, 1, 3), 4)
    two = torch.tensor(2.0).log()
    assert_close(sums, torch.stack([900 + two, two - 900, two * -torch.inf, two * -torch.inf])[None, None, None])


@pytest.mark.parametrize("slots", [0, 3])
def test_no_targets_give_no_sums(slots):
    weights, target = torch.zeros(1, 2, slots), torch.zeros(1, 2, slots, dtype=torch.int64)
    assert sum_by_target(weights, torch.zeros(1, 2, slots, 5), target, 0).shape == (1, 2, 0, 5)
    assert count_by_target(weights, target, 0).shape == (1, 2, 0)
    assert logsumexp_by_target(weights[:, :, None], target, 0).shape == (1, 2, 1, 0)
