"""What is drawn: as often as scores say, the widest values always, and each row for itself."""

import attrs
import pytest
import torch
from torch.testing import assert_close

from kvpolicy.stages import SelectionRequest
from kvpolicy_plugins.selectors.sample import Sample
from tests.support.views import view_of


def request_of(scores, count, *, ranges=None, **changes):
    """A request of a row with scores [..., T]; by default all are candidates, with equal ranges."""
    scores = torch.as_tensor(scores, dtype=torch.float32).expand(1, 1, -1)
    ranges = torch.ones_like(scores) if ranges is None else torch.as_tensor(ranges).expand_as(scores)
    made = SelectionRequest(
        scores=scores,
        candidates=torch.ones_like(scores, dtype=torch.bool),
        counts=torch.tensor([[count]]),
        positions=torch.arange(scores.shape[-1]).expand_as(scores),
        second_scores=ranges,
    )
    return attrs.evolve(made, **changes)


def places(chosen):
    return chosen[0, 0].nonzero().flatten().tolist()


def test_entries_are_drawn_as_often_as_their_scores_say():
    """One of four, many times over heads: chi-square with 3 degrees of freedom is below 16.3 with probability 0.999."""
    scores, heads = torch.tensor([0.1, 0.2, 0.3, 0.4]), 4000
    many = {
        "candidates": torch.ones(1, heads, 4, dtype=torch.bool),
        "counts": torch.ones(1, heads, dtype=torch.int64),
        "positions": torch.arange(4).expand(1, heads, 4),
        "second_scores": torch.ones(1, heads, 4),
    }
    chosen = Sample(0).select(SelectionRequest(scores.expand(1, heads, 4), **many))
    expected = scores * heads
    assert float(((chosen[0].sum(0) - expected) ** 2 / expected).sum()) < 16.3


def test_scores_up_to_zero_come_last_in_order_of_position_and_nan_after_them():
    scores = [-torch.inf, 0.0, -1.0, 1e-30, torch.nan, 0.0]
    for count, expected in enumerate([[], [3], [1, 3], [1, 2, 3], [1, 2, 3, 5], [0, 1, 2, 3, 5]]):
        assert places(Sample(0).select(request_of(scores, count))) == expected


def test_the_first_tokens_and_the_widest_values_stay_whatever_they_score():
    """Half of the eight that are held: two sinks and two of wide values."""
    ranges = torch.tensor([1.0, 1, 9, 1, 2, 7, torch.nan, 3, 8, 1])
    scores = torch.tensor([0.0, 0, 0, 1, 1, 0, 1, 1, 0, 1])
    request = request_of(scores, 8, ranges=ranges)
    assert places(Sample(0.5, sinks=2).reserved(request)) == [0, 1, 2, 8]
    assert {0, 1, 2, 8} < set(places(Sample(0.5, sinks=2).select(request)))


def test_the_share_is_of_all_that_is_held_and_at_most_of_what_may_stay():
    candidates = torch.ones(1, 1, 10, dtype=torch.bool)
    candidates[..., 4:] = False
    request = request_of(torch.ones(10), 3, ranges=torch.arange(10.0), candidates=candidates)
    assert places(Sample(0.25, sinks=0).reserved(request)) == [2, 3]  # 9 are held
    assert places(Sample(1, sinks=0).select(request)) == [1, 2, 3]


def test_a_share_of_a_thousand_is_not_one_less_by_rounding():
    request = request_of(torch.ones(1200), 1000)
    assert int(Sample(0.29, sinks=0).reserved(request).sum()) == 290


def test_a_range_that_is_not_finite_is_none():
    values = torch.tensor([[1.0, -2], [torch.inf, 0], [torch.nan, 1]]).expand(1, 1, 3, 2).contiguous()
    ranges = Sample().second_scores(view_of(torch.zeros(1, 1, 3, 2), values=values))
    assert_close(ranges, torch.tensor([[[3.0, torch.nan, torch.nan]]]), equal_nan=True)


@pytest.mark.parametrize(
    "other", [{"layer": 1}, {"positions": torch.arange(1, 51).expand(1, 1, 50)}], ids=["layer", "event"]
)
def test_layers_and_events_draw_otherwise(other):
    request = request_of(torch.ones(50), 25)
    assert not torch.equal(Sample(0).select(request), Sample(0).select(attrs.evolve(request, **other)))


def test_seeds_draw_otherwise():
    request = request_of(torch.ones(50), 25)
    assert not torch.equal(Sample(0).select(request), Sample(0, seed=1).select(request))
