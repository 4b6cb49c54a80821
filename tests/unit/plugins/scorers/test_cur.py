"""CUR scores where they divide by zero, and their blocks."""

import attrs
import pytest
import torch
from torch.testing import assert_close

from kvpolicy_plugins.scorers.attention_free.cur import Cur
from tests.support.views import view_of


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("leverage", ["key", "value", "average", "product"])
def test_blocks_of_zeros_score_zero(leverage):
    keys = normal(1, 1, 12, 8)
    keys[:, :, 4:8] = 0.0
    scores = Cur(leverage, window=4).score(view_of(keys))

    assert (scores[0, 0, 4:8] == 0).all()
    assert_close(scores.sum(-1), torch.ones(1, 1))
    assert (Cur(leverage, window=4).score(view_of(torch.zeros(1, 1, 12, 8))) == 0).all()


def test_each_block_of_keys_has_an_equal_share():
    """Three whole blocks, and a shorter one that counts as much."""
    scores = Cur("key", window=4).score(view_of(normal(1, 2, 14, 8)))

    assert_close(torch.stack([block.sum(-1) for block in scores.split(4, -1)]), torch.full((4, 1, 2), 0.25))


def test_blocks_are_of_what_is_held_in_order_of_position():
    view = view_of(normal(1, 1, 10, 8), lengths=torch.tensor([[9]]))
    order = torch.tensor([3, 8, 0, 5, 1, 7, 2, 4, 6, 9])
    shuffled = {name: getattr(view, name)[:, :, order] for name in ("keys", "values", "positions")}
    scorer, other = Cur(window=3), attrs.evolve(view, **shuffled, in_order=False)

    assert_close(scorer.score(other)[..., :9], scorer.score(view)[..., order[:9]])


@pytest.mark.parametrize("scorer", [Cur(), Cur("value", 0), Cur(rank=5, window=0), Cur("average", rank=5)])
def test_rows_and_heads_of_other_lengths_score_what_they_score_alone(scorer):
    keys, values = normal(2, 2, 20, 8), normal(2, 2, 20, 8, seed=1)
    lengths = torch.tensor([[20, 7], [13, 13]])
    together = scorer.score(view_of(keys, values=values, lengths=lengths))
    for row in range(2):
        longest = int(lengths[row].max())
        alone = view_of(
            keys[[row], :, :longest], values=values[[row], :, :longest], lengths=lengths[[row]].clamp(max=longest)
        )
        valid = alone.valid[0]
        assert_close(scorer.score(alone)[0][valid], together[row, :, :longest][valid])


def test_keys_and_values_of_other_widths_share_a_sketch():
    keys, values = normal(1, 1, 9, 8), normal(1, 1, 9, 4, seed=1)
    gaussian = normal(1, 1, 8, 3, seed=2)
    expected = (keys @ gaussian).square().sum(-1) * (values @ gaussian[:, :, :4]).square().sum(-1)
    view, scorer = view_of(keys, values=values), Cur(rank=3, window=0)

    assert_close(scorer.sketched(view, gaussian), expected / expected.sum())
    assert scorer.score(view).isfinite().all()


def test_every_compression_draws_anew():
    keys = normal(1, 1, 9, 8)
    scorer, view = Cur(rank=3, window=0), view_of(keys)
    later = attrs.evolve(view, positions=view.positions + 1)

    assert not torch.allclose(scorer.score(later), scorer.score(view))
    assert not torch.allclose(scorer.score(attrs.evolve(view, layer=1)), scorer.score(view))
    assert_close(Cur(window=0).score(later), Cur(window=0).score(view))
