"""What a fit to the window makes of entries, windows and parameters."""

import math

import attrs
import pytest
import torch
from torch.testing import assert_close

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Needs
from kvpolicy_plugins.mergers.window_fit import WindowFit
from tests.support.views import view_of

FIRST_STAYS = torch.tensor([[[0]]])


def layer(keys, queries, asked=None, **rest):
    """One head with keys and values [T, D], queries [G, W, D], scaling 1; the queries come after the entries."""
    keys, queries = torch.tensor(keys)[None, None], torch.tensor(queries)[None]
    after = keys.shape[2] + torch.arange(queries.shape[2])
    asked = after if asked is None else torch.tensor(asked)
    return view_of(keys, queries=queries, query_positions=asked[None], scaling=1.0, **rest)


def test_one_query_gets_its_output_back():
    """What the tangent at that query gives: weights by attention, and the mass that the group had."""
    view = layer([[1.0, 0], [0, 1], [3, 3]], [[[2.0, 1.0]]])
    entries = WindowFit().merge(view, torch.tensor([[[0, 2]]]))
    assert entries.changed.tolist() == [[[False, True]]]
    before = view.logits[:, :, 0].softmax(-1) @ view.values
    logits = view.queries @ entries.keys.transpose(-1, -2) + entries.log_votes[:, :, None]
    assert_close(logits.softmax(-1) @ entries.values, before)
    assert_close(logits.logsumexp(-1), view.logits[:, :, 0].logsumexp(-1))


def test_the_fit_has_the_mass_of_the_group_on_average():
    """Two queries that see only the group: log-sum-exp exceeds the fit at one, falls short at the other."""
    view = layer([[1.0, 0], [0, 1.0]], [[[2.0, 1.0], [-3.0, 1.0]]])
    entries = WindowFit(attended=0).merge(view, FIRST_STAYS)
    found = (view.queries @ entries.keys.transpose(-1, -2)).squeeze(-1) + entries.log_votes[:, :, None, 0]
    wanted = view.logits[:, :, 0].logsumexp(-1)
    assert_close((found - wanted).sum().item(), 0.0, atol=1e-5, rtol=0)
    assert (found - wanted).abs().amax() > 0.1


def test_votes_count_as_entries():
    twice = layer([[1.0, 0], [1.0, 0], [0, 1.0]], [[[2.0, 1.0], [0.5, 3.0]]])
    once = layer([[1.0, 0], [0, 1.0]], [[[2.0, 1.0], [0.5, 3.0]]], log_votes=torch.tensor([[[2.0, 1]]]).log())
    found, expected = (WindowFit(attended=0).merge(view, FIRST_STAYS) for view in (once, twice))
    for name in ("keys", "values", "log_votes"):
        assert_close(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("assign", ["cosine", "ward"])
@pytest.mark.parametrize("asked", [[-1, -1], [0, -1]])
def test_without_a_query_that_sees_the_group_votes_decide(assign, asked):
    votes = torch.tensor([[[1.0, 3]]]).log()
    view = layer([[1.0, 0], [0, 1.0]], [[[9.0, 1.0], [2.0, -7.0]]], asked, log_votes=votes)
    entries = WindowFit(assign, attended=0).merge(view, FIRST_STAYS)
    assert_close(entries.keys, torch.tensor([[[[0.25, 0.75]]]]))
    assert_close(entries.log_votes.item(), math.log(4))


def test_a_query_from_before_an_entry_does_not_count():
    queries = [[[5.0, -2.0], [2.0, 1.0]]]
    both = layer([[1.0, 0], [0, 1.0]], queries, asked=[0, 1])
    last = layer([[1.0, 0], [0, 1.0]], [[[0.0, 0.0], [2.0, 1.0]]], asked=[-1, 1])
    found, expected = (WindowFit(attended=0).merge(view, torch.tensor([[[1]]])) for view in (both, last))
    for name in ("keys", "values", "log_votes"):
        assert_close(getattr(found, name), getattr(expected, name))


def test_only_the_last_queries_are_fitted():
    view = layer([[1.0, 0], [0, 1.0]], [[[5.0, -2.0], [2.0, 1.0]]])
    short = layer([[1.0, 0], [0, 1.0]], [[[2.0, 1.0]]], asked=[3])
    found, expected = WindowFit(queries=1).merge(view, FIRST_STAYS), WindowFit().merge(short, FIRST_STAYS)
    for name in ("keys", "values", "log_votes"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert WindowFit(queries=7).needs() == Needs(queries=7)
    assert WindowFit().needs() == Needs()


@pytest.mark.parametrize("assign", ["cosine", "ward"])
def test_an_entry_that_is_kept_without_attention_is_not_overwritten(assign):
    """Slot 0 is what nobody asks for yet; the evicted slot 2 resembles it most, and gets more attention."""
    keys = [[0.1, 1.0, 0], [4.0, 0, 0], [3.0, 3.0, 0], [2.0, 0, 0.5]]
    view = layer(keys, [[[1.0, 0, 0], [1.1, 0, 0]]])
    kept = torch.tensor([[[0, 1]]])
    entries = WindowFit(assign).merge(view, kept)
    assert entries.changed.tolist() == [[[False, True]]]
    assert torch.equal(entries.keys[0, 0, 0], view.keys[0, 0, 0])
    assert WindowFit("cosine", attended=0).merge(view, kept).changed[0, 0, 0]


def test_equal_attention_is_attention_enough():
    """However many there are: the mean of equal numbers is not rounded to more than they are."""
    for count in range(2, 90):
        view = layer([[0.3, 0.7]] * count, [[[1.0, 0.2], [0.3, -0.7], [2.0, 1.0]]])
        entries = WindowFit().merge(view, torch.tensor([[[1]]]))
        assert entries.changed.all()
        assert_close(entries.log_votes.item(), math.log(count), atol=1e-5, rtol=1e-5)


def test_below_the_threshold_entries_are_dropped():
    view = layer([[1.0, 0], [0.6, 0.8]], [[[1.0, 1.0]]])
    assert WindowFit(threshold=0.59, attended=0).merge(view, FIRST_STAYS).changed.all()
    entries = WindowFit(threshold=0.61, attended=0).merge(view, FIRST_STAYS)
    assert not entries.changed.any()
    assert entries.log_votes.item() == 0


def test_ward_goes_by_logits_and_values_not_by_angles():
    """Slot 2 points like slot 0, but the query cannot tell it from slot 1, and their values are the same."""
    view = layer([[1.0, 4.0], [1.0, -1.0], [1.0, 1.0]], [[[3.0, 0.0]]])
    view = attrs.evolve(view, values=torch.tensor([[[[5.0, 0], [0, 1], [0, 1]]]]))
    kept = torch.tensor([[[0, 1]]])
    assert WindowFit("cosine").merge(view, kept).changed.tolist() == [[[True, False]]]
    assert WindowFit("ward").merge(view, kept).changed.tolist() == [[[False, True]]]


def test_logits_beyond_the_range_of_exp():
    view = layer([[1.0, 0], [0, 1.0], [0.5, 0.5]], [[[900.0, 899.0], [-900.0, 899.0]]])
    entries = WindowFit().merge(view, torch.tensor([[[0, 1]]]))
    for part in (entries.keys, entries.values, entries.log_votes):
        assert part.isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"assign": "nearest"}, "assign: must be one of cosine, ward: 'nearest'"),
        ({"threshold": -2}, "threshold: must be a number from -1 to 1: -2"),
        ({"attended": -1}, "attended: must be a number from 0 to 1e+06: -1"),
        ({"queries": -1}, "queries: must be an integer from 0 to 4096: -1"),
        ({"assign": "ward", "threshold": 0.5}, "threshold: must be -1 unless entries are assigned by cosine: 0.5"),
    ],
)
def test_wrong_parameters(wrong, message):
    with pytest.raises(ParameterError) as caught:
        WindowFit(**wrong)
    assert str(caught.value).startswith(message)
