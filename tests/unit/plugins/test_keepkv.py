"""What KeepKV makes of entries, scores and parameters."""

import math

import attrs
import pytest
import torch
from torch.testing import assert_close

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Needs, QueryLogits
from kvpolicy_plugins.mergers.keepkv import KeepKV
from kvpolicy_plugins.mergers.keepkv_groups import fold
from kvpolicy_plugins.mergers.shared.merge_groups import groups_of
from kvpolicy_plugins.mergers.shared.score_estimates import MovingAverage, WindowMean
from tests.support.views import fresh_state, view_of

FIRST_STAYS = torch.tensor([[[0]]])


def pair(scores, merger=None, keys=((1.0, 0), (0.6, 0.8)), **rest):
    """A view of two entries with scores, one query along the first axis, and the state of a merger that saw them."""
    keys = torch.tensor(keys)[None, None]
    values = torch.tensor([[[[1.0, 0], [0, 1]]]])
    query = torch.tensor([[[[2.0, 0]]]])
    view = view_of(keys, values=values, queries=query, scaling=1.0, **rest)
    if merger is None:
        return view
    state = fresh_state(merger, view)
    return attrs.evolve(
        view, slot_state=merger.observe_forward(QueryLogits(torch.tensor(scores).reshape(1, 1, 1, 1, 2)), state)
    )


def test_equal_scores_average():
    merger = KeepKV(-1, key="bias")
    entries = merger.merge(pair([1.5, 1.5], merger), FIRST_STAYS)
    assert_close(entries.keys, torch.tensor([[[[0.8, 0.4]]]]))
    assert_close(entries.values, torch.tensor([[[[0.5, 0.5]]]]))
    assert_close(entries.log_votes, torch.tensor([[[math.log(2)]]]))
    assert_close(merger._estimate.log_scores(entries.slot_state), torch.tensor([[[1.5]]]))


@pytest.mark.parametrize("fallback", ["additive", "bias"])
@pytest.mark.parametrize(("scores", "scaled"), [([2.0, 1.2], True), ([-2.0, -1.2], False), ([0.5, -1.5], False)])
def test_a_factor_out_of_bounds_falls_back(fallback, scores, scaled):
    merger, other = KeepKV(-1, fallback=fallback), KeepKV(-1, key=fallback)
    found = merger.merge(pair(scores, merger), FIRST_STAYS)
    expected = other.merge(pair(scores, other), FIRST_STAYS)
    same = torch.equal(found.keys, expected.keys) and torch.equal(found.log_votes, expected.log_votes)
    assert same == (not scaled)
    if scaled:
        assert_close(found.log_votes.exp().item(), 2.0)


def test_a_larger_factor_may_be_allowed():
    negative = [-2.0, -1.2]
    merger, mean = KeepKV(-1, scale_max=2), KeepKV(-1, key="mean")
    keys = merger.merge(pair(negative, merger), FIRST_STAYS).keys
    ratio = keys / mean.merge(pair(negative, mean), FIRST_STAYS).keys
    assert_close(ratio[..., 0], ratio[..., 1])
    assert 1 < ratio[0, 0, 0, 0] <= 2


def test_below_the_threshold_votes_are_lost():
    merger = KeepKV(0.61)
    entries = merger.merge(pair([1.0, 1.0], merger), FIRST_STAYS)
    assert not entries.changed.any()
    assert entries.log_votes.item() == 0
    assert KeepKV(0.59).merge(pair([1.0, 1.0], merger), FIRST_STAYS).changed.all()


def test_opposite_keys_merge_at_minus_one():
    merger = KeepKV(-1, key="bias")
    entries = merger.merge(pair([1.0, 1.0], merger, keys=((1.0, 0), (-1.0, 0))), FIRST_STAYS)
    assert entries.changed.all()
    assert_close(entries.keys, torch.zeros(1, 1, 1, 2))


def test_a_group_that_nobody_saw_is_averaged_by_votes():
    keys = torch.tensor([[[[1.0], [2], [7]]]])
    groups = groups_of(torch.tensor([[[0, 2]]]), torch.tensor([[[False, True, False]]]), torch.zeros(1, 1, 3).long())
    unseen = torch.full((1, 1, 3), -torch.inf)
    folded = fold(keys, keys, unseen, torch.tensor([[[1.0, 3, 2]]]).log(), groups)
    assert_close(folded.keys, torch.tensor([[[[1.75], [7]]]]))
    assert_close(folded.log_votes.exp(), torch.tensor([[[4.0, 2]]]))
    assert_close(folded.gap, torch.zeros(1, 1, 2))
    merger = KeepKV(-1)
    view = pair(None)
    entries = merger.merge(attrs.evolve(view, slot_state=fresh_state(merger, view)), FIRST_STAYS)
    assert_close(entries.keys, torch.tensor([[[[0.8, 0.4]]]]))
    assert entries.slot_state["log_estimate"].item() == -torch.inf


def test_scores_beyond_the_range_of_exp():
    merger = KeepKV(-1, key="bias")
    for size in (500.0, -500.0):
        entries = merger.merge(pair([size, size - 1], merger), FIRST_STAYS)
        weight = 1 / (1 + math.exp(-1))
        assert_close(entries.values[0, 0, 0], torch.tensor([weight, 1 - weight]), atol=1e-4, rtol=1e-4)
        assert_close(entries.slot_state["log_estimate"].isfinite(), torch.tensor([[[True]]]))


def test_a_query_of_zero_corrects_nothing():
    merger = KeepKV(-1, key="additive")
    view = pair([2.0, 1.0], merger)
    still = attrs.evolve(view, queries=torch.zeros_like(view.queries))
    absent = attrs.evolve(view, query_positions=torch.tensor([[-1]]))
    mean = KeepKV(-1, key="mean").merge(view, FIRST_STAYS)
    for one in (still, absent):
        assert torch.equal(merger.merge(one, FIRST_STAYS).keys, mean.keys)


def test_scores_seen_unequally_often_merge_as_they_are_expected():
    """One was seen by a hundred queries, the other by one: both are expected to go on as they were."""
    merger = KeepKV(-1, key="bias")
    view = pair(None)
    state = fresh_state(merger, view)
    seen_once = torch.tensor([[1.0, -torch.inf]]).expand(99, 2)
    logits = torch.cat([seen_once, torch.ones(1, 2)])[None, None, None]
    rule = MovingAverage(0.9, 100)
    view = attrs.evolve(view, slot_state=rule.observe_forward(QueryLogits(logits), state))
    entries = merger.merge(view, torch.tensor([[[1]]]))
    assert_close(rule.log_scores(entries.slot_state), torch.ones(1, 1, 1))
    assert entries.slot_state["samples"].item() == 1


def test_a_mean_over_the_window_counts_only_real_queries():
    """A pad's query, which sees nothing, pushes no other one out of the window."""
    rule = WindowMean(2)
    state = {one.name: torch.full((2, 1, 1), one.fill) for one in rule.states()}
    logits = torch.tensor([[1.0, 2, 3], [4.0, 5, -torch.inf]])[:, None, None, :, None]
    for size in (1, 2):
        found = state
        for part in logits.split(size, 3):
            found = rule.observe_forward(QueryLogits(part), found)
        means = [math.log((math.exp(first) + math.exp(second)) / 2) for first, second in ((2, 3), (4, 5))]
        assert_close(rule.log_scores(found).flatten(), torch.tensor(means))


def test_heads_of_a_group_are_averaged():
    for rule in (MovingAverage(0.5, 3), WindowMean(3)):
        state = {one.name: torch.full((1, 1, 1), one.fill) for one in rule.states()}
        logits = torch.tensor([1.0, 3.0]).reshape(1, 1, 2, 1, 1)
        expected = math.log((math.exp(1) + math.exp(3)) / 2)
        assert_close(rule.log_scores(rule.observe_forward(QueryLogits(logits), state)).item(), expected)


def test_only_the_newest_queries_are_observed():
    for rule in (MovingAverage(0.5, 2), WindowMean(2)):
        state = {one.name: torch.full((1, 1, 1), one.fill) for one in rule.states()}
        logits = torch.randn(1, 1, 1, 5, 1, generator=torch.Generator().manual_seed(3))
        found, expected = (rule.observe_forward(QueryLogits(part), state) for part in (logits, logits[..., -2:, :]))
        for name in state:
            assert torch.equal(found[name], expected[name])


def test_what_is_observed():
    assert KeepKV().needs() == Needs(queries=1, forward_queries=32)
    assert KeepKV(fallback="bias", window=5).needs() == Needs(forward_queries=5)
    assert KeepKV(key="additive", fallback="bias").needs().queries == 1
    assert KeepKV(key="mean").needs().queries == KeepKV(key="bias").needs().queries == 0
    assert [one.name for one in KeepKV().slot_state()] == ["log_estimate", "samples"]
    assert len(KeepKV(estimate="window", window=7).slot_state()) == 7 + 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"threshold": -1.5}, "threshold: must be a number from -1 to 2: -1.5"),
        ({"estimate": "mean"}, "estimate: must be one of ema, window: 'mean'"),
        ({"alpha": 1}, "alpha: must be less than 1: 1"),
        ({"alpha": -0.1}, "alpha: must be a number from 0 to 1"),
        ({"window": 0}, "window: must be an integer from 1 to 4096: 0"),
        ({"key": "sum"}, "key: must be one of scale, additive, bias, mean: 'sum'"),
        ({"scale_max": 0}, "scale_max: must be a number above 0, up to 1e+09: 0"),
        ({"fallback": "mean"}, "fallback: must be one of additive, bias: 'mean'"),
        ({"gqa": "expand"}, "gqa: must be one of shared, lstsq: 'expand'"),
        ({"gqa": "lstsq"}, "gqa: must be shared unless the key is additive: lstsq"),
    ],
)
def test_wrong_parameters(wrong, message):
    with pytest.raises(ParameterError) as caught:
        KeepKV(**wrong)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("options", [{}, {"key": "mean"}, {"key": "additive", "gqa": "lstsq"}, {"estimate": "window"}])
@pytest.mark.parametrize("votes", [False, True], ids=["plain", "votes"])
def test_few_evicted_entries_are_merged_as_many_are(options, votes):
    """Only the groups that something joins are computed then. Several join one, and one joins none."""
    random = torch.Generator().manual_seed(1)
    rows, heads, slots, evicted = 2, 2, 24, 4
    keys, values = (torch.randn(rows, heads, slots, 8, generator=random, dtype=torch.float32) for _ in range(2))
    keys[..., 20:22, :] = keys[..., 5:6, :] * 1.5 + 0.01 * keys[..., 20:22, :]
    keys[..., 22, :] = keys[..., 9, :] * 0.5
    keys[..., 23, :] = -keys[..., :20, :].mean(-2)
    merger = KeepKV(0.8, **options)
    queries = torch.randn(rows, 4, 3, 8, generator=random, dtype=torch.float32)
    log_votes = torch.rand(rows, heads, slots, generator=random, dtype=torch.float32) if votes else None
    view = view_of(keys, values=values, queries=queries, scaling=0.3, log_votes=log_votes)
    logits = torch.randn(rows, heads, 2, 3, slots, generator=random, dtype=torch.float32)
    view = attrs.evolve(view, slot_state=merger.observe_forward(QueryLogits(logits), fresh_state(merger, view)))
    kept = torch.arange(slots - evicted).expand(rows, heads, -1).clone()
    kept[1, 0] = torch.tensor([*range(1, 20), -1])  # a row that has had one entry less
    many = merger.merge(view, kept)
    few = merger.merge(attrs.evolve(view, most_evicted=5), kept)
    assert many.changed.sum() == 2 * rows * heads
    assert torch.equal(few.changed, many.changed)
    for found, expected in ((few.keys, many.keys), (few.values, many.values), (few.log_votes, many.log_votes)):
        assert_close(found, expected)
    for name, expected in many.slot_state.items():
        assert_close(few.slot_state[name], expected)
