"""KeyDiff on keys whose scores are known."""

import torch
from torch.testing import assert_close

from kvpolicy_plugins.scorers.attention_free.keydiff import KeyDiff
from tests.support.views import view_of


def test_the_key_against_all_others_is_kept_first():
    """Three along one axis, one across, one against: the anchor is (2, 1) / 5."""
    keys = torch.tensor([[2.0, 0], [1, 0], [7, 0], [0, 3], [-1, 0]])[None, None]
    along, across = 2 / 5**0.5, 1 / 5**0.5

    assert_close(KeyDiff().score(view_of(keys)), torch.tensor([[[-along, -along, -along, -across, along]]]))


def test_a_head_without_a_direction_scores_zero():
    keys = torch.tensor([[1.0, 0], [-1, 0], [0, 0]])[None, None]

    assert (KeyDiff().score(view_of(keys)) == 0).all()


def test_keys_of_half_precision_are_scored_in_float32():
    keys = torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    scores = KeyDiff().score(view_of(keys))

    assert scores.dtype == torch.float32
    assert_close(scores, KeyDiff().score(view_of(keys.float())))
