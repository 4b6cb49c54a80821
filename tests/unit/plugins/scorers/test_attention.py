"""Window attention at its edges."""

import attrs
import pytest
import torch
from torch.testing import assert_close

from kvpolicy_plugins.pooling import Pool
from kvpolicy_plugins.scorers.attention import Attention
from tests.views import view_of


@pytest.fixture
def view():
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 2, 12, 16, generator=random)
    return view_of(keys, queries=torch.randn(2, 4, 6, 16, generator=random), recent=3)


def test_only_the_last_queries_vote(view):
    last = attrs.evolve(view, queries=view.queries[:, :, -2:])
    assert_close(Attention(2).score(view), Attention(2).score(last))


def test_a_row_with_fewer_queries_averages_over_its_own(view):
    positions = torch.tensor([[6, 7, 8, 9, 10, 11], [-1, -1, -1, -1, 10, 11]])
    padded = attrs.evolve(view, query_positions=positions)
    junk = view.queries.clone()
    junk[1, :, :4] = torch.nan
    found = Attention(6).score(attrs.evolve(padded, queries=junk))
    assert_close(found[0], Attention(6).score(view)[0])
    assert_close(found[1], Attention(2).score(view)[1])


def test_a_query_does_not_see_what_came_after_it(view):
    early = attrs.evolve(view, query_positions=torch.full((2, 6), 5))
    assert (Attention(6).score(early)[..., 6:] == 0).all()
    assert (Attention(6, causal=False).score(early)[..., 6:] > 0).all()


def test_a_query_that_sees_no_candidate_gives_nothing(view):
    first = attrs.evolve(view, query_positions=torch.zeros(2, 6, dtype=torch.int64), sinks=1)
    assert (Attention(6, softmax="candidates").score(first) == 0).all()


def test_one_query_has_no_deviation(view):
    assert_close(Attention(1, deviation=5).score(view), Attention(1).score(view))


def test_pooling_sees_candidates_only():
    scores = torch.tensor([[9.0, 1, 2, 3, 9]])
    inside = torch.tensor([[False, True, True, True, False]])
    assert Pool("max", 3)(scores, inside)[0, 1:4].tolist() == [2, 3, 3]
    assert Pool("average", 3)(scores, inside)[0, 1:4].tolist() == pytest.approx([1, 2, 5 / 3])
    assert Pool("none", 3)(scores, inside) is scores


def test_the_scaling_of_the_model_counts(view):
    sharper = attrs.evolve(view, scaling=view.scaling * 3)
    tripled = attrs.evolve(view, queries=view.queries * 3)
    assert_close(Attention(6).score(sharper), Attention(6).score(tripled))
