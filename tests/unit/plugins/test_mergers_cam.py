"""Whom a value is spread over, how likely, and what is drawn."""

import attrs
import pytest
import torch
from torch.testing import assert_close

from kvpolicy.errors import ParameterError
from kvpolicy.stages.slots import indices_of
from kvpolicy_plugins.mergers.cam import CaM
from tests.support.views import view_of


def layer(attention, **rest):
    """One head whose newest query attends to the entries as given; values are powers of 10."""
    weights = torch.tensor(attention, dtype=torch.float64)
    keys = weights.log().clamp(min=-1e4)[None, None, :, None].float()
    values = 10.0 ** torch.arange(len(attention))[None, None, :, None]
    query = torch.ones(1, 1, 1, 1)
    return view_of(keys, values=values, queries=query, scaling=1.0, **rest)


def keeping(view, *slots):
    mask = torch.zeros_like(view.valid)
    mask[..., list(slots)] = True
    return indices_of(mask)


@pytest.mark.parametrize(
    ("over", "probability"),
    [("targets", 0.1 / 0.2), ("recent", 0.1 / ((0.1 + 0.3 + 0.4) / 3))],
)
def test_a_value_is_spread_over_the_next_kept_ones(over, probability):
    view = layer([0.1, 0.1, 0.1, 0.3, 0.4])
    entries = CaM(window=2, mode="expected", over=over).merge(view, keeping(view, 0, 2, 3, 4))
    added = probability * 10 / 2
    assert_close(entries.values.flatten(), torch.tensor([1, 100 + added, 1000 + added, 10000]), rtol=1e-5, atol=0)
    assert entries.changed.flatten().tolist() == [False, True, True, False]


def test_near_the_end_a_value_is_spread_over_what_is_left():
    view = layer([0.1, 0.4, 0.4, 0.1])
    entries = CaM(window=3, mode="expected").merge(view, keeping(view, 0, 3))
    assert_close(entries.values.flatten(), torch.tensor([1.0, 1000 + 10 + 100]), rtol=1e-5, atol=0)


def test_what_no_kept_entry_follows_is_dropped():
    view = layer([0.1, 0.1, 0.8])
    entries = CaM(mode="expected").merge(view, keeping(view, 0, 1))
    assert entries.values.flatten().tolist() == [1, 10]
    assert not entries.changed.any()


@pytest.mark.parametrize(("own", "added"), [(0.0, 0.0), (0.5, 1.0)])
def test_without_attention_to_the_targets(own, added):
    """0/0 merges nothing, and anything else over 0 merges for certain."""
    view = layer([own, 0.0, 1.0 - own])
    assert CaM(window=1).merge(view, keeping(view, 1, 2)).values.flatten().tolist() == [10 + added, 100]


def test_attention_is_averaged_over_queries_and_group():
    """Four queries; two of the first position see the first entry only."""
    view = view_of(
        torch.zeros(1, 1, 2, 1),
        values=torch.tensor([[[[8.0], [16.0]]]]),
        queries=torch.ones(1, 2, 2, 1),
        query_positions=torch.tensor([[0, 1]]),
    )
    kept = keeping(view, 1)
    last, both = (CaM(mode="expected", queries=queries).merge(view, kept).values for queries in (1, 0))
    assert last.item() == 16 + 8  # 1/2 of 1/2
    view = attrs.evolve(view, positions=torch.tensor([[[1, 0]]]))  # the kept one is seen by both queries
    assert both.item() == 16 + 8
    assert_close(CaM(mode="expected", queries=0).merge(view, kept).values.item(), 16 + 8 * (0.25 / 0.75))


def test_a_query_that_a_row_never_had_counts_for_nothing():
    view = attrs.evolve(layer([0.5, 0.5]), query_positions=torch.tensor([[-1]]))
    assert CaM().merge(view, keeping(view, 1)).values.item() == 10


def drawn(merger, view):
    """Whether each of the evicted entries was merged; the last entry is kept, probabilities are 1/2."""
    return merger.merge(view, keeping(view, view.keys.shape[2] - 1)).values - view.values[:, :, -1:]


def halves(rows=1, slots=9, **rest):
    keys = torch.zeros(rows, 1, slots, 1)
    keys[:, :, :-1] = -torch.tensor(2.0).log()
    values = 2.0 ** torch.arange(slots)[:, None].expand(rows, 1, slots, 1)
    return view_of(keys, values=values, queries=torch.ones(rows, 1, 1, 1), scaling=1.0, **rest)


def test_draws_have_the_probabilities_of_the_expected_mode():
    view = halves(slots=11)
    total = sum(drawn(CaM(seed=seed), view).item() for seed in range(400)) / 400
    expected = drawn(CaM(mode="expected"), view).item()
    spread = (sum(4.0**power for power in range(10)) / 4 / 400) ** 0.5
    assert_close(expected, (2**10 - 1) / 2, rtol=1e-5, atol=0)
    assert abs(total - expected) < 4 * spread


def test_draws_depend_on_seed_layer_and_position_only():
    view = halves(slots=21)
    first = drawn(CaM(), view)
    assert torch.equal(drawn(CaM(), view), first)
    assert not torch.equal(drawn(CaM(seed=1), view), first)
    assert not torch.equal(drawn(CaM(), attrs.evolve(view, layer=1)), first)
    assert not torch.equal(drawn(CaM(), attrs.evolve(view, positions=view.positions + 1)), first)
    twice = halves(rows=2, slots=21)
    assert torch.equal(drawn(CaM(), twice), first.expand(2, 1, 1, 1))


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    drawn(CaM(), halves())
    assert torch.equal(torch.get_rng_state(), before)


def test_it_asks_for_its_queries():
    assert CaM(queries=3).needs().queries == 3
    assert CaM.reads_window


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 0}, "window: must be an integer from 1 to 1000000000: 0"),
        ({"queries": -1}, "queries: must be an integer from 0 to 4096: -1"),
        ({"seed": -1}, "seed: must be an integer from 0 to 4294967295: -1"),
        ({"mode": "mean"}, "mode: must be one of bernoulli, expected: 'mean'"),
        ({"over": "all"}, "over: must be one of targets, recent: 'all'"),
    ],
)
def test_wrong_parameters_are_refused(wrong, message):
    with pytest.raises(ParameterError, match=message):
        CaM(**wrong)
