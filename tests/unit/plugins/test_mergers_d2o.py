"""Which evicted entries are worth merging, and what of them is carried on."""

import math
from types import SimpleNamespace

import attrs
import pytest
import torch
from torch.testing import assert_close

from kvpolicy.errors import ParameterError
from kvpolicy.stages.slots import indices_of
from kvpolicy_plugins.mergers.d2o import D2O
from tests.support.views import view_of


def layer(*heads, threshold=-torch.inf, **rest):
    """Heads of two-dimensional keys, given by the cosine to (1, 0); values count from 1."""
    cosines = torch.tensor(heads)[None]
    keys = torch.stack([cosines, (1 - cosines**2).sqrt()], -1)
    values = 1.0 + torch.arange(cosines.shape[-1])[:, None].expand(*cosines.shape, 1)
    return view_of(keys, values=values, row_state={"threshold": torch.tensor([threshold])}, **rest)


def keeping(view, *heads):
    mask = torch.zeros_like(view.valid)
    for head, slots in enumerate(heads):
        mask[:, head, slots] = True
    return indices_of(mask)


def test_the_first_threshold_is_the_mean_similarity():
    view = layer([1.0, 0.8, 0.4])
    entries = D2O().merge(view, keeping(view, [0]))
    assert_close(entries.row_state["threshold"], torch.tensor([0.6]))
    assert_close(entries.values.item(), (1 + 0.8 * 2) / 2)  # 0.4 is dropped
    assert_close(entries.keys.flatten(), torch.tensor([1 + 0.8 * 0.8, 0.8 * 0.6]) / 2)


@pytest.mark.parametrize(("old", "value"), [(0.9, 1.0), (0.6, (1 + 0.8 * 2) / 2), (0.0, (1 + 0.8 * 2 + 0.4 * 3) / 3)])
def test_later_thresholds_move(old, value):
    merger = D2O(alpha=0.9, beta=0.1)
    view = layer([1.0, 0.8, 0.4], threshold=old)
    entries = merger.merge(view, keeping(view, [0]))
    assert_close(entries.row_state["threshold"], torch.tensor([0.9 * old + 0.06]))
    assert_close(entries.values.item(), value)


def test_weights_of_the_paper_sum_to_one():
    view = layer([1.0, 0.8, 0.8])
    entries = D2O(normalize="softmax").merge(view, keeping(view, [0]))
    weight = math.exp(0.8)
    assert_close(entries.values.item(), (math.e * 1 + weight * 2 + weight * 3) / (math.e + 2 * weight))


def test_equal_similarities_are_not_below_their_mean():
    view = view_of(torch.ones(1, 1, 50, 3), row_state={"threshold": torch.tensor([-torch.inf])})
    view = attrs.evolve(view, values=torch.arange(50.0)[None, None, :, None])
    assert_close(D2O().merge(view, keeping(view, [0])).values.item(), 24.5)


@pytest.mark.parametrize(
    ("together", "first"),
    [
        ("position", 1.0),  # position 1: 0.9 and 0.1, mean 0.5; positions 2 and 3: 0.3 and 0.8, each alone
        ("rank", (1 + 0.3 * 3) / 2),  # first of each head: 0.9 and 0.1; second of each: 0.3 and 0.8, mean 0.55
    ],
)
def test_heads_decide_together(together, first):
    view = layer([1.0, 0.9, 0.3, -1.0], [1.0, 0.1, 0.8, -1.0])
    view = attrs.evolve(view, positions=torch.tensor([[[0, 1, 2, 4], [0, 1, 3, 4]]]))
    entries = D2O(together=together).merge(view, keeping(view, [0, 3], [0, 3]))
    assert_close(entries.row_state["threshold"], torch.tensor([0.525]))
    assert_close(entries.values[0, ..., 0], torch.tensor([[first, 4.0], [(1 + 0.8 * 3) / 2, 4.0]]))


def test_rows_have_thresholds_of_their_own():
    one, two = layer([1.0, 0.8, 0.4]), layer([1.0, 0.2, 0.0])
    joined = {name: torch.cat([getattr(one, name), getattr(two, name)]) for name in ("keys", "values", "positions")}
    state = {"threshold": torch.tensor([-torch.inf, 0.5])}
    entries = D2O().merge(attrs.evolve(one, **joined, row_state=state), keeping(one, [0]).expand(2, 1, 1))
    assert_close(entries.row_state["threshold"], torch.tensor([0.6, 0.3]))


@pytest.mark.parametrize("old", [-torch.inf, 0.25])
def test_a_trigger_that_evicts_nothing_leaves_the_threshold(old):
    view = layer([1.0, 0.5], threshold=old)
    assert D2O().merge(view, keeping(view, [0, 1])).row_state["threshold"].tolist() == [old]


def test_a_new_row_has_no_threshold():
    assert [(state.name, state.fill) for state in D2O().row_state()] == [("threshold", -torch.inf)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 1.5}, "alpha: must be a number from 0 to 1: 1.5"),
        ({"beta": -0.1}, "beta: must be a number from 0 to 1: -0.1"),
        ({"normalize": "sum"}, "normalize: must be one of count, softmax: 'sum'"),
        ({"together": "slot"}, "together: must be one of position, rank: 'slot'"),
    ],
)
def test_wrong_parameters_are_refused(wrong, message):
    with pytest.raises(ParameterError, match=message):
        D2O(**wrong)


@pytest.mark.parametrize("seed", range(4))
def test_entries_at_one_position_are_decided_on_together(seed):
    """They get one number in each row, whatever slots they are in; empty slots have one of their own."""
    numbers = torch.Generator().manual_seed(seed)
    positions = torch.randint(-1, 9, (2, 3, 7), generator=numbers)
    view = SimpleNamespace(positions=positions)
    pairs, bound = D2O()._pairs(view, positions >= 0)
    assert int(pairs.max()) < bound
    for places, own in zip(positions.flatten(1), pairs.flatten(1), strict=True):
        assert torch.equal(places[:, None] == places, own[:, None] == own)
