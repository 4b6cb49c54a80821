"""Mergers that send evicted entries to the kept key most alike."""

import attrs
import pytest
import torch
from torch.testing import assert_close

from kvpolicy.errors import ParameterError
from kvpolicy.stages.slots import gather, indices_of
from kvpolicy_plugins.mergers.cam import CaM
from kvpolicy_plugins.mergers.d2o import D2O
from kvpolicy_plugins.mergers.kvmerger import KVMerger
from kvpolicy_plugins.mergers.pivot import Pivot
from kvpolicy_plugins.mergers.tome import ToMe
from kvpolicy_plugins.mergers.weighted import Weighted
from kvpolicy_plugins.mergers.weightedkv import WeightedKV
from tests.support.views import view_of


def layer(cosines, values, **rest):
    """One head of two-dimensional keys, given by the cosine to (1, 0)."""
    cosine = torch.tensor(cosines)
    keys = torch.stack([cosine, (1 - cosine**2).sqrt()], -1)[None, None]
    return view_of(keys, values=torch.tensor(values)[None, None, :, None], **rest)


def test_weighted_counts_by_likeness():
    view = layer([1.0, 0.6, 0.0], [2.0, 4, 8])
    entries = Weighted().merge(view, torch.tensor([[[0]]]))
    assert_close(entries.values.item(), (2 + 0.8 * 4 + 0.5 * 8) / 2.3)
    assert_close(entries.keys.flatten(), torch.tensor([1 + 0.8 * 0.6, 0.8 * 0.8 + 0.5]) / 2.3)


def test_the_opposite_counts_next_to_nothing():
    view = layer([1.0, -1.0], [1.0, 3.0])
    assert_close(Weighted().merge(view, torch.tensor([[[0]]])).values.item(), 1 + 2e-6, rtol=0, atol=3e-7)


def test_pivot_keeps_half_the_weight():
    view = layer([1.0, 0.6, 0.0], [2.0, 4, 8])
    entries = Pivot().merge(view, torch.tensor([[[0]]]))
    assert_close(entries.values.item(), (2 + 3 + 5) / 3)
    assert_close(entries.keys.flatten(), torch.tensor([1 + 0.8 + 0.5, 0.4 + 0.5]) / 3)


@pytest.mark.parametrize("merger", [Weighted(merge_keys=False), Pivot(merge_keys=False), ToMe()])
def test_keys_may_stay(merger):
    view = layer([1.0, 0.6, 0.0], [2.0, 4, 8])
    entries = merger.merge(view, torch.tensor([[[0]]]))
    assert torch.equal(entries.keys, view.keys[:, :, :1])
    assert entries.changed.item()


def test_the_recent_window_takes_in_what_is_like_it():
    view = layer([-1.0, 0.9, 0.5, 1.0], [1.0, 2, 4, 8], recent=1)
    entries = Weighted().merge(view, torch.tensor([[[0, 3]]]))
    assert entries.changed.flatten().tolist() == [False, True]


def test_tome_weighs_by_the_norms_of_values():
    view = layer([1.0, 0.5, 0.25], [3.0, 1, -9])
    entries = ToMe().merge(view, torch.tensor([[[0]]]))
    first, second = 0.5 * 1 / 4, 0.25 * 9 / 12
    assert_close(entries.values.item(), (3 + first - second * 9) / (1 + first + second))


@pytest.mark.parametrize(("threshold", "merged"), [(0.0, 4), (0.3, 3), (0.5, 2), (0.95, 0)])
def test_tome_merges_from_the_threshold_on(threshold, merged):
    view = layer([1.0, -0.5, 0.0, 0.25, 0.4, 0.5, 0.75], [0.0] + [1.0] * 6)
    entries = ToMe(threshold=threshold).merge(view, torch.tensor([[[0]]]))
    shares = sorted([0.25, 0.4, 0.5, 0.75])[4 - merged :]
    assert_close(entries.values.item(), sum(shares) / (1 + sum(shares)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("fraction", "threshold", "shares"),
    [
        (0.5, 0.0, [0.5, 0.75]),  # border between 0.25 and 0.5
        (2 / 3, 0.0, [0.25, 0.5, 0.75]),  # exactly at 0.25
        (0.01, 0.0, [0.75]),
        (0.5, 0.6, [0.75]),  # border at -inf, or between it and a number: the threshold alone decides
        (0.1, 0.6, [0.75]),
    ],
)
def test_tome_merges_a_share_of_the_most_similar(fraction, threshold, shares):
    view = layer([1.0, 0.0625, 0.25, 0.5, 0.75], [0.0] + [1.0] * 4)
    entries = ToMe(threshold, fraction).merge(view, torch.tensor([[[0]]]))
    assert_close(entries.values.item(), sum(shares) / (1 + sum(shares)), atol=1e-6, rtol=0)


def test_tome_takes_the_share_of_each_head_alone():
    """A head that evicts two of its entries, beside one that evicts four."""
    keys = torch.tensor([1.0, 0.0625, 0.25, 0.5, 0.75])
    keys = torch.stack([keys, (1 - keys**2).sqrt()], -1).expand(1, 2, 5, 2)
    values = torch.tensor([0.0, 1, 1, 1, 1]).expand(1, 2, 5)[..., None]
    view = view_of(keys, values=values, lengths=torch.tensor([[5, 3]]))
    entries = ToMe(fraction=0.5).merge(view, torch.tensor([[[0], [0]]]))
    assert_close(entries.values.flatten(), torch.tensor([1.25 / 2.25, 0.25 / 1.25]))


ALL = [Weighted(), Pivot(), ToMe(fraction=0.5), D2O(), KVMerger(), WeightedKV(), CaM()]


@pytest.mark.parametrize("merger", ALL, ids=lambda merger: merger.name)
def test_heads_and_layers_that_keep_nothing(merger):
    keys = torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    view = view_of(
        keys,
        queries=torch.ones(1, 4, 1, 4),
        attention=torch.ones(1, 2, 2, 6),
        row_state={"threshold": torch.tensor([-torch.inf])} if merger.row_state() else {},
    )
    mask = torch.zeros_like(view.valid)
    mask[:, 1, 2] = True
    one = merger.merge(view, indices_of(mask))
    assert not one.keys[:, 0].any()
    assert not one.values[:, 0].any()
    assert (one.values.shape, one.values.isfinite().all()) == ((1, 2, 1, 4), True)
    none = merger.merge(view, indices_of(torch.zeros_like(mask)))
    assert none.keys.shape == none.values.shape == (1, 2, 0, 4)


@pytest.mark.parametrize("merger", ALL, ids=lambda merger: merger.name)
def test_keys_and_values_may_have_other_widths(merger):
    random = torch.Generator().manual_seed(0)
    view = view_of(
        torch.randn(1, 1, 8, 4, generator=random),
        values=torch.randn(1, 1, 8, 6, generator=random),
        queries=torch.ones(1, 1, 1, 4),
        attention=torch.ones(1, 1, 1, 8),
        row_state={"threshold": torch.tensor([-torch.inf])} if merger.row_state() else {},
    )
    entries = merger.merge(view, torch.tensor([[[1, 4]]]))
    assert (entries.keys.shape[-1], entries.values.shape[-1]) == (4, 6)


def test_votes_are_not_kept():
    view = layer([1.0, 0.5], [1.0, 2.0])
    voted = attrs.evolve(view, log_votes=torch.ones(1, 1, 2))
    kept = torch.tensor([[[0]]])
    assert Weighted().merge(voted, kept).log_votes is None
    assert torch.equal(Weighted().merge(voted, kept).values, Weighted().merge(view, kept).values)
    assert not any(merger.votes for merger in ALL)


def test_what_takes_nothing_in_stays_bit_for_bit():
    view = layer([1.0, 0.9, -1.0], [0.1, 0.2, 0.3])
    kept = torch.tensor([[[0, 2]]])
    entries = Weighted().merge(view, kept)
    assert entries.changed.flatten().tolist() == [True, False]
    assert torch.equal(entries.values[:, :, 1], gather(view.values, kept)[:, :, 1])


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (Weighted, {"merge_keys": "no"}, "merge_keys: must be true or false: 'no'"),
        (Pivot, {"merge_keys": 1}, "merge_keys: must be true or false: 1"),
        (ToMe, {"threshold": -0.5}, "threshold: must be a number from 0 to 1: -0.5"),
        (ToMe, {"fraction": 0}, "fraction: must be a number above 0, up to 1"),
    ],
)
def test_wrong_parameters_are_refused(kind, wrong, message):
    with pytest.raises(ParameterError, match=message):
        kind(**wrong)
