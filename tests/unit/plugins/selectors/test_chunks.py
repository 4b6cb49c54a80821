"""Chunks stay whole, as far as counts go."""

import pytest
import torch

from kvpolicy_plugins.selectors.chunks import Chunks
from tests.support.selecting import selected_by


def kept(selector, scores, count, candidates=None):
    scores = torch.tensor([[scores]])
    inside = torch.ones_like(scores, dtype=torch.bool) if candidates is None else torch.tensor([[candidates]]).bool()
    return selected_by(selector, scores, inside, torch.tensor([[count]]))[0, 0].nonzero().flatten().tolist()


def test_the_best_chunks_stay_and_the_next_is_filled_with_its_best_entries():
    scores = [9.0, 0, 0, 4, 4, 4, 2, 5, 3, 0, 0, 0]
    assert kept(Chunks(3), scores, 3) == [3, 4, 5]
    assert kept(Chunks(3), scores, 5) == [3, 4, 5, 7, 8]
    assert kept(Chunks(3), scores, 7) == [0, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(("reduce", "expected"), [("mean", [4]), ("sum", [0])])
def test_a_short_last_chunk_counts_by_its_mean_or_its_sum(reduce, expected):
    assert kept(Chunks(2, reduce), [3.0, 3, 0, 0, 5], 1) == expected


def test_protected_entries_of_a_chunk_do_not_count():
    """The first chunk has one candidate, of score 3; the second two, of 2 on average."""
    assert kept(Chunks(2), [9.0, 3, 2, 2], 1, candidates=[0, 1, 1, 1]) == [1]
    assert kept(Chunks(2), [0.0, 3, 2, 2], 1, candidates=[0, 1, 1, 1]) == [1]


def test_nan_counts_in_no_chunk_and_comes_last():
    scores = [torch.nan, 1.0, 2, 2, -torch.inf, 5]
    assert kept(Chunks(2), scores, 1) == [5]
    assert kept(Chunks(2), scores, 4) == [1, 2, 3, 5]
    assert kept(Chunks(2), scores, 5) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("size", [1, 6, 10**9])
def test_chunks_of_one_or_of_all_are_the_best_entries(size):
    assert kept(Chunks(size), [3.0, 1, 4, 1, 5, 9], 3) == [2, 4, 5]
