"""Frames of a video: which are recent, what is compared, and what becomes of frames that are not whole."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvpolicy.stages import Geometry, SelectionRequest
from kvpolicy_plugins.scorers.attention_free.frame_value_norm import FrameValueNorm
from kvpolicy_plugins.selectors.temporal_redundancy import TemporalRedundancy
from tests.support.views import view_of

HALF = TemporalRedundancy(2, 0.5, 0.5)


def keys_at(*angles):
    """One head, whose keys [1, 1, T, 2] point in these directions (degrees)."""
    radians = torch.deg2rad(torch.tensor(angles, dtype=torch.float32))
    return torch.stack([radians.cos(), radians.sin()], -1)[None, None]


def choose(selector, view, scores, count):
    scores = torch.as_tensor(scores, dtype=torch.float32).expand(view.positions.shape)
    counts = torch.full(view.positions.shape[:2], count)
    request = SelectionRequest.of(view, scores, counts, selector.second_scores(view))
    return selector.select(request)[0, 0].nonzero().flatten().tolist()


def test_patches_are_compared_with_those_at_their_place_in_recent_frames():
    """Four frames of two patches, of which two are recent; lengths of keys do not count."""
    keys = keys_at(0, 90, 90, 60, 0, 0, 90, 0) * torch.arange(1, 9)[:, None]
    found = HALF.second_scores(view_of(keys))[0, 0]
    assert_close(found[:4], torch.tensor([-0.5, 0.0, -0.5, -0.5]))


def test_recent_frames_then_what_differs_then_scores():
    view = view_of(keys_at(0, 90, 90, 60, 180, 80, 0, 90, 0, 0, 0, 0, 0, 0))  # 7 frames; 3 are recent: from 8 on
    scores = [9, 0, 8, 0, 0, 0, 7, 0, *[1] * 6]
    # of 12 candidates 6 are not chosen by score: the recent ones; then by score, of equals the earlier ones
    assert choose(HALF, view, scores, 12) == [0, 1, 2, 3, 4, 6, *range(8, 14)]
    assert choose(TemporalRedundancy(2, 0.5, 0.8), view, scores, 12) == [0, 1, 2, 4, 6, 7, *range(8, 14)]
    assert choose(TemporalRedundancy(2, 0.5, 1.0), view, scores, 11) == [1, 2, 4, 5, 7, *range(8, 14)]


def test_rounding_of_the_share_is_to_even():
    """Half of 5 by score is 2, half of 7 is 4."""
    view = view_of(keys_at(0, 10, 20, 30, 40, 50, 60, 70, 90))
    one = TemporalRedundancy(1, 0.12, 0.5)
    scores = list(range(9, 0, -1))
    assert choose(one, view, scores, 5) == [0, 1, 2, 3, 8]  # the newest, 2 at right angles to it, 2 by score
    assert choose(one, view, [*range(9)], 5) == [0, 1, 6, 7, 8]
    assert choose(one, view, [*range(9)], 7) == [0, 1, 4, 5, 6, 7, 8]


def test_an_incomplete_frame_stays_and_is_compared_with_nothing():
    keys = keys_at(0, 90, 90, 0, 0, 0, 0, 90, 45)
    view, whole = view_of(keys), view_of(keys[:, :, :8])
    assert_close(HALF.second_scores(view)[..., :4], HALF.second_scores(whole)[..., :4])
    assert choose(HALF, view, 9.0, 5) == [4, 5, 6, 7, 8]
    assert choose(HALF, whole, 9.0, 5) == [0, 4, 5, 6, 7]


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_where_recent_frames_do_not_fit_the_newest_entries_stay(count):
    view = view_of(keys_at(0, 90, 90, 0, 0, 0, 0, 90))
    assert choose(HALF, view, [9, *[0] * 7], count) == list(range(8 - count, 8))


def test_without_a_recent_frame_scores_decide():
    view = view_of(keys_at(0, 90, 90, 0))
    assert choose(TemporalRedundancy(2, 0.4, 1.0), view, [1, 4, 3, 2], 2) == [1, 2]


def test_text_that_is_protected_is_in_no_frame():
    """As sinks, and as a region between two frames."""
    keys = keys_at(0, 90, 90, 0, 0, 0, 0, 90)
    text = torch.tensor([1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]).bool()
    long = torch.full((1, 1, 13, 2), 3.0)
    long[:, :, ~text] = keys
    pinned = text & (torch.arange(13) > 2)
    view = view_of(long, sinks=3, pinned=pinned.expand(1, 1, 13))
    assert_close(HALF.second_scores(view)[..., ~text][..., :4], HALF.second_scores(view_of(keys))[..., :4])
    assert not set(choose(HALF, view, 1.0, 5)) & set(text.nonzero().flatten().tolist())


def test_a_score_that_is_not_a_number_is_last_also_in_a_recent_frame():
    view = view_of(keys_at(0, 90, 90, 0, 0, 0, 0, 90))
    scores = [1, 1, 1, 1, 1, 1, 1, float("nan")]
    assert choose(HALF, view, scores, 7) == list(range(7))


@given(st.integers(0, 99), st.sampled_from(["none", "1d", "2d", "3d", "depth"]), st.integers(0, 3))
def test_rows_heads_and_the_order_of_slots_do_not_matter(seed, pool, layer):
    """Heads of other lengths have frames of their own; what is not in order of position is put in order."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, 2, 40, 4, generator=generator).unbind()
    lengths = torch.randint(1, 41, (2, 2), generator=generator)
    shown = {"values": values, "geometry": Geometry((0, 1, 2, 3), 2, 2, 4), "layer": layer, "sinks": 2}
    view = view_of(keys, lengths=lengths, **shown)
    scorer, selector = FrameValueNorm(3, 3, pool, 5), TemporalRedundancy(9, 0.4, 0.5)
    scores, second = scorer.score(view), selector.second_scores(view)
    order = torch.stack([torch.randperm(40, generator=generator) for _ in range(4)]).view(2, 2, 40)
    entries = [each.gather(2, order[..., None].expand_as(each)) for each in (keys, values)]
    positions = view.positions.gather(-1, order)
    mixed = attrs.evolve(view, keys=entries[0], values=entries[1], positions=positions, in_order=False)
    inside = mixed.candidates
    assert_close(scorer.score(mixed)[inside], scores.gather(-1, order)[inside])
    assert_close(selector.second_scores(mixed)[inside], second.gather(-1, order)[inside])
    for row, head in ((0, 0), (1, 1)):
        own = slice(row, row + 1), slice(head, head + 1), slice(0, int(lengths[row, head]))
        alone = view_of(keys[own], **{**shown, "values": values[own], "geometry": Geometry((0, 1, 2, 3), 1, 1, 4)})
        assert_close(scorer.score(alone)[alone.candidates], scores[own][alone.candidates])
        assert_close(selector.second_scores(alone)[alone.candidates], second[own][alone.candidates])


def pooled(kind, rows, columns, frames, size=3, **rest):
    """Averages of norms that are all 1: the share of the window that is within the grid."""
    values = torch.ones(1, 1, rows * columns * frames, 1)
    return FrameValueNorm(rows, columns, kind, size).score(view_of(values, **rest))[0, 0].view(frames, rows, columns)


def test_zeros_beyond_the_edges_count():
    assert_close(pooled("2d", 3, 3, 3)[1], torch.tensor([[4, 6, 4], [6, 9, 6], [4, 6, 4]]) / 9)
    assert_close(pooled("3d", 3, 3, 4)[0, 1], torch.tensor([12, 18, 12]) / 27)
    assert_close(pooled("3d", 3, 3, 4)[1, 1], torch.tensor([18, 27, 18]) / 27)
    assert_close(pooled("1d", 1, 4, 2).flatten(), torch.tensor([2, 3, 3, 3, 3, 3, 3, 2]) / 3)


@pytest.mark.parametrize("kind", ["2d", "3d"])
def test_the_window_is_no_larger_than_the_grid(kind):
    assert_close(pooled(kind, 4, 5, 9, 5), pooled(kind, 4, 5, 9, 3))
    assert_close(pooled(kind, 7, 7, 4, 7), pooled(kind, 7, 7, 4, 3))
    assert torch.equal(pooled(kind, 2, 9, 9), torch.ones(9, 2, 9))
    assert torch.equal(pooled(kind, 9, 9, 2), torch.ones(2, 9, 9))


def test_pooling_by_depth_reaches_the_last_layer_whatever_their_number():
    shown = [pooled("depth", 9, 9, 9, layer=layer, geometry=Geometry(tuple(range(6)), 1, 1, 1)) for layer in range(6)]
    for found, (kind, size) in zip(shown, (("3d", 7), ("2d", 5), ("1d", 3), *[("none", 1)] * 3), strict=True):
        assert torch.equal(found, pooled(kind, 9, 9, 9, size))
