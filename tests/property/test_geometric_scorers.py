"""What holds for scorers that look at keys and values alone."""

import attrs
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvpolicy.stages import Rotary
from kvpolicy_plugins.scorers.attention_free.cur import Cur
from kvpolicy_plugins.scorers.attention_free.keydiff import KeyDiff
from kvpolicy_plugins.scorers.attention_free.lagkv import LagKV
from kvpolicy_plugins.scorers.attention_free.leverage import Leverage
from tests.property.layers import layers

ORDINARY = ("normal", "clustered")
partitions = st.builds(LagKV, st.integers(0, 5), st.integers(1, 9), cross=st.booleans())


@given(layers(contents=ORDINARY), st.floats(0.5, 8))
def test_lengths_of_keys_do_not_change_keydiff(view, factor):
    stretch = torch.linspace(1, factor, view.keys.shape[2])[:, None]
    stretched = KeyDiff().score(attrs.evolve(view, keys=view.keys * stretch))
    assert_close(stretched, KeyDiff().score(view), atol=1e-5, rtol=1e-4)


@given(layers(), st.integers(0, 2**20))
def test_equal_keys_have_equal_keydiff_scores_between_minus_one_and_one(view, number):
    one, other = number % view.keys.shape[2], number // 80 % view.keys.shape[2]
    keys = view.keys.clone()
    keys[:, :, other] = keys[:, :, one]
    scores = KeyDiff().score(attrs.evolve(view, keys=keys))
    both = view.valid[..., one] & view.valid[..., other]
    assert_close(scores[..., one][both], scores[..., other][both], atol=1e-6, rtol=1e-5)
    assert (scores.abs() <= 1 + 1e-5).all()


@given(layers(), partitions)
def test_each_partition_has_every_rank_once_and_the_rest_is_one(view, scorer):
    scores = scorer.score(view)
    ranks = torch.arange(scorer.lag) / scorer.lag
    for length, own in zip(view.lengths.flatten().tolist(), scores.flatten(0, 1), strict=True):
        count = (length - scorer.sinks) // scorer.lag
        assert (own[: scorer.sinks] == 1).all()
        if count < 2:
            behind = own[scorer.sinks : length]
            assert_close(behind, torch.arange(len(behind)) / max(1, len(behind)))
            continue
        ends = scorer.sinks + (count - 1) * scorer.lag
        assert (own[ends:length] == 1).all()
        parts = own[scorer.sinks : ends].unflatten(0, (count - 1, scorer.lag))
        if scorer.cross:
            assert_close(parts.sum(-1), torch.ones(count - 1), atol=1e-5, rtol=0)
        else:
            assert torch.equal(parts.sort(-1).values, ranks.expand(count - 1, -1))


@given(layers(contents=ORDINARY), partitions)
def test_scales_of_channels_do_not_change_lagkv(view, scorer):
    """By powers of two, which round nothing."""
    scales = 2.0 ** (torch.arange(view.keys.shape[-1]) % 7 - 3)
    scaled = attrs.evolve(view, keys=view.keys * scales, values=view.values * scales)
    assert torch.equal(scorer.score(scaled), scorer.score(view))


@given(layers(contents=ORDINARY), st.builds(Cur, window=st.sampled_from((0, 3, 16)), rank=st.sampled_from((0, 5))))
def test_scales_of_all_keys_or_all_values_do_not_change_cur(view, scorer):
    for leverage in ("key", "value", "product"):
        scorer = attrs.evolve(scorer, leverage=leverage)
        scaled = attrs.evolve(view, keys=view.keys * 3, values=view.values / 5)
        assert_close(scorer.score(scaled), scorer.score(view), atol=1e-6, rtol=1e-4)


@given(layers(), st.sampled_from((1, 3, 16)))
def test_cur_is_a_distribution_of_equal_parts_for_each_block(view, window):
    view = attrs.evolve(view, keys=view.keys + 2)
    scores = Cur("key", window).score(view)
    for length, own in zip(view.lengths.flatten().tolist(), scores.flatten(0, 1), strict=True):
        sums = torch.stack([block.sum() for block in own[:length].split(window)])
        assert_close(sums, torch.full_like(sums, 1 / len(sums)), atol=1e-5, rtol=1e-4)


@given(layers(), st.integers(1, 24), st.integers(0, 3))
def test_leverage_is_at_most_one_and_sums_to_the_rank_at_most(view, rank, seed):
    half = view.keys.shape[-1] // 2
    view = attrs.evolve(view, rotary=Rotary(1.0 / torch.arange(1, half + 1)))
    scores = Leverage(rank, seed=seed).score(view).masked_fill(~view.valid, 0.0)
    assert ((scores >= 0) & (scores <= 1 + 1e-5)).all()
    assert (scores.sum(-1) <= rank + 1e-4).all()


@given(layers(contents=("normal",)), st.floats(-4, 4))
def test_a_shift_of_all_keys_before_rotation_changes_no_leverage(view, shift):
    assume(view.keys.shape[2] > 2)
    view = attrs.evolve(view, rotary=Rotary(torch.zeros(view.keys.shape[-1] // 2)))
    moved = attrs.evolve(view, keys=view.keys + shift)
    assert_close(Leverage(6).score(moved), Leverage(6).score(view), atol=1e-4, rtol=1e-3)
