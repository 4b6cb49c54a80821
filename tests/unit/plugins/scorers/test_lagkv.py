"""LagKV where its formula divides by zero, and on heads of all lengths."""

import attrs
import pytest
import torch
from torch.testing import assert_close

from kvpolicy_plugins.scorers.attention_free.lagkv import LagKV
from tests.support.views import view_of

CROSS = LagKV(1, 4, cross=True)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_channel_that_is_constant_in_the_reference_counts_nothing():
    """Nothing divides by zero, and the channel is as if it were 0 everywhere."""
    keys = normal(1, 1, 13, 8)
    keys[:, :, 5:9, 2] = 3.0  # of the second partition, the reference of the first
    scores = CROSS.score(view_of(keys))
    reference = keys[0, 0, 5:9]
    scale = reference.amax(0) - reference.amin(0)
    spread = (keys[0, 0, 1:5] - reference.amin(0)) / scale.where(scale > 0, 1)
    spread[:, 2] = 0.0

    assert scores.isfinite().all()
    assert_close(scores[0, 0, 1:5], spread.std(-1).softmax(-1))


@pytest.mark.parametrize("far", [1e20, 3e38])
def test_scales_of_any_size_give_finite_scores(far):
    keys = 1e-30 * normal(1, 1, 13, 8)
    keys[:, :, 2, 3] = far

    assert CROSS.score(view_of(keys)).isfinite().all()
    assert CROSS.score(view_of(keys))[0, 0, 1:5].argmax() == 1


@pytest.mark.parametrize("scorer", [CROSS, LagKV(1, 4)])
def test_heads_of_other_lengths_score_what_they_score_alone(scorer):
    keys = normal(1, 5, 17, 8)
    lengths = torch.tensor([[17, 16, 12, 9, 8]])
    together = scorer.score(view_of(keys, lengths=lengths))

    for head, length in enumerate(lengths[0].tolist()):
        alone = scorer.score(view_of(keys[:, [head], :length]))
        assert torch.equal(alone[0, 0], together[0, head, :length])
    assert (together[0, :4, 5:].amin(-1) == 1).tolist() == [False, False, True, True]
    assert_close(together[0, 4, :8], torch.tensor([1, *(age / 7 for age in range(7))]))


def test_partitions_are_of_what_is_held():
    """After compressions positions have gaps; only their order counts."""
    view = view_of(normal(1, 2, 13, 8))
    later = attrs.evolve(view, positions=view.positions * 3 + (view.positions > 6) * 40)

    assert torch.equal(CROSS.score(later), CROSS.score(view))


def test_of_equal_entries_the_earlier_one_ranks_higher():
    scores = LagKV(0, 4).score(view_of(torch.ones(1, 1, 12, 8)))

    assert scores[0, 0].tolist() == [0.75, 0.5, 0.25, 0.0] * 2 + [1.0] * 4


@pytest.mark.parametrize("scorer", [CROSS, LagKV(1, 4)])
def test_nan_is_not_ranked(scorer):
    """A NaN reaches the partitions that it takes part in, where it is seen, and no other head."""
    keys = normal(1, 2, 17, 8)
    keys[0, 0, 6, 3] = torch.nan
    scores = scorer.score(view_of(keys))

    assert scores[0, 0, 1:9].isnan().all()
    assert scores[0, 0, 9:].isfinite().all()
    assert scores[0, 1].isfinite().all()
