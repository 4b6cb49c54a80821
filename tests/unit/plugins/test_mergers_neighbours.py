"""Mergers that send evicted entries to a kept neighbour."""

import math

import attrs
import pytest
import torch
from torch.testing import assert_close

from kvpolicy.errors import ParameterError
from kvpolicy.stages.slots import indices_of
from kvpolicy_plugins.mergers.kvmerger import KVMerger
from kvpolicy_plugins.mergers.weightedkv import WeightedKV, average_attention
from tests.support.views import view_of


def layer(keys, values, **rest):
    """One head; keys are lengths along one of two axes, negative along the second."""
    length = torch.tensor(keys)
    along = torch.stack([length.clamp(min=0), -length.clamp(max=0)], -1)[None, None]
    return view_of(along, values=torch.tensor(values)[None, None, :, None], **rest)


def keeping(view, *slots):
    mask = torch.zeros_like(view.valid)
    mask[..., list(slots)] = True
    return indices_of(mask)


def test_members_of_a_run_join_the_nearest_pivot():
    """Slots 0 to 4 are one run, kept 0 and 3; 5 and 6 are another, without a pivot."""
    view = layer([1.0, 2, 3, 4, 5, -1, -1], [1.0, 2, 4, 8, 16, 32, 64])
    entries = KVMerger().merge(view, keeping(view, 0, 3))
    alone = math.exp(-1 / 2)  # one joins: its distance is the mean
    assert_close(entries.values[0, 0, 0].item(), (1 + alone * 2) / (1 + alone))
    assert_close(entries.values[0, 0, 1].item(), (8 + alone * (4 + 16)) / (1 + 2 * alone))
    assert_close(entries.keys[0, 0, 1], torch.tensor([(4 + alone * (3 + 5)) / (1 + 2 * alone), 0]))


def test_the_kernel_is_as_wide_as_the_mean_distance():
    view = layer([4.0, 5, 7], [0.0, 1, 1])
    near, far = (math.exp(-((distance / 2) ** 2) / 2) for distance in (1, 3))
    entries = KVMerger().merge(view, keeping(view, 0))
    assert_close(entries.values.item(), (near + far) / (1 + near + far))


def test_of_two_pivots_as_near_the_earlier_one_takes_in():
    view = layer([1.0, 2, 3], [1.0, 2, 4])
    assert KVMerger().merge(view, keeping(view, 0, 2)).changed.flatten().tolist() == [True, False]


def test_a_pivot_of_another_run_takes_nothing_in():
    view = layer([1.0, -1, 2, -2], [1.0, 2, 4, 8])
    assert not KVMerger().merge(view, keeping(view, 0, 3)).changed.any()


def test_equal_keys_count_alike():
    view = layer([1.0, 1, 1], [1.0, 2, 6])
    assert KVMerger().merge(view, keeping(view, 1)).values.item() == 3


def test_protected_entries_never_change():
    view = layer([1.0] * 6, [1.0, 2, 4, 8, 16, 32], sinks=1, recent=2)
    entries = KVMerger().merge(view, keeping(view, 0, 4, 5))
    assert not entries.changed.any()
    entries = KVMerger().merge(view, keeping(view, 0, 2, 4, 5))
    assert entries.changed.flatten().tolist() == [False, True, False, False]
    assert_close(entries.values[0, 0, 1].item(), (2 + 4 + 8) / 3)


@pytest.mark.parametrize(("similarity", "merged"), [(0.59, True), (0.61, False)])
def test_runs_go_by_similarity(similarity, merged):
    view = view_of(torch.tensor([[[[1.0, 0], [0.6, 0.8]]]]))
    assert KVMerger(similarity).merge(view, keeping(view, 0)).changed.item() is merged


def test_similarity_outside_the_range_of_cosines_is_refused():
    with pytest.raises(ParameterError, match=r"similarity: must be a number from -1 to 1: 1\.5"):
        KVMerger(1.5)


def attended(mass, **rest):
    """Group of two: `mass` and three times as much; values are powers of 10."""
    received = torch.tensor(mass)[None, None]
    values = 10.0 ** torch.arange(len(mass))[None, None, :, None]
    return view_of(values, values=values, attention=torch.stack([received, 3 * received], 2), **rest)


def test_average_attention_is_per_query_that_saw_the_entry():
    view = attended([4.0, 3, 2, 1])
    assert_close(average_attention(view).flatten(), 2 * torch.tensor([1.0, 1, 1, 1]))
    far = attrs.evolve(view, positions=torch.tensor([[[0, 4, 8, 9]]]))
    assert_close(average_attention(far).flatten(), 2 * torch.tensor([0.4, 0.5, 1, 1]))


def test_the_newest_position_is_that_of_the_row():
    view = attrs.evolve(
        view_of(torch.ones(1, 2, 2, 4), attention=torch.ones(1, 2, 1, 2)),
        positions=torch.tensor([[[0, 3], [0, -1]]]),
    )
    assert average_attention(view).flatten().tolist() == [0.25, 1, 0.25, 0]


def test_values_go_to_the_next_kept_entry():
    view = attended([4.0, 6, 2, 3])  # per query: 1, 2, 1, 3
    entries = WeightedKV().merge(view, keeping(view, 0, 2, 3))
    assert_close(entries.values.flatten(), torch.tensor([1, (2 * 10 + 100) / 3, 1000]))
    assert entries.changed.flatten().tolist() == [False, True, False]
    assert torch.equal(entries.keys, view.keys[:, :, [0, 2, 3]])


def test_what_comes_last_goes_to_the_last_kept_entry():
    view = attended([4.0, 6, 2, 3])
    entries = WeightedKV().merge(view, keeping(view, 0, 1))
    assert_close(entries.values.flatten(), torch.tensor([1, (2 * 10 + 100 + 3 * 1000) / 6]))


def test_what_nobody_attended_to_is_dropped():
    view = attended([4.0, 0, 0, 0])
    assert not WeightedKV().merge(view, keeping(view, 0, 2)).changed.any()


def test_a_kept_entry_nobody_attended_to_takes_the_value_of_what_joins():
    view = attended([4.0, 3, 0, 1])
    assert_close(WeightedKV().merge(view, keeping(view, 0, 2, 3)).values.flatten(), torch.tensor([1.0, 10, 1000]))


def test_attention_is_asked_for():
    assert WeightedKV().needs().attention
    view = view_of(torch.ones(1, 1, 2, 4))
    with pytest.raises(ValueError, match="no attention"):
        WeightedKV().merge(view, keeping(view, 0))
