"""The random scorer draws evenly, for each entry anew, and the same for a row whatever is beside it."""

import attrs
import pytest
import torch
from torch.testing import assert_close

from kvpolicy.stages import Geometry, View
from kvpolicy_plugins.scorers.random_draw import RandomDraw
from kvpolicy_plugins.shared.seeded_draws import mixed

GEOMETRY = Geometry((0, 1), 4, 2, 8)


def view_of(positions, **changes):
    keys = torch.randn(*positions.shape, 8)
    return View(keys, keys.clone(), positions, GEOMETRY, 1.0, **changes)


def places(rows=1, slots=4096, start=0):
    return torch.arange(start, start + slots).expand(rows, 2, slots).contiguous()


def test_draws_are_uniform():
    """Counts in 16 bins: chi-square with 15 degrees of freedom is below 37.7 with a probability of 0.999."""
    draws = torch.cat([RandomDraw(seed).score(view_of(places())).flatten() for seed in range(4)])
    counts = torch.histc(draws, 16, 0, 1)
    expected = len(draws) / 16

    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    assert float(((counts - expected) ** 2 / expected).sum()) < 37.7


@pytest.mark.parametrize(
    "other",
    [
        lambda one: RandomDraw(1).score(one),
        lambda one: RandomDraw(0).score(attrs.evolve(one, layer=1)),
        lambda one: RandomDraw(0).score(one).flip(1),
        lambda one: RandomDraw(0).score(attrs.evolve(one, positions=places(slots=4097)[..., 1:].contiguous())),
    ],
    ids=["seed", "layer", "head", "event"],
)
def test_draws_differ(other):
    """By seed, layer, head and event: the correlation of 8,192 pairs is below 0.05."""
    one = view_of(places())
    pair = torch.stack([RandomDraw(0).score(one).flatten(), other(one).flatten()])

    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.05


def test_a_row_draws_the_same_alone_and_in_any_order_of_its_entries():
    """Whatever else is in the batch; and keys and values count for nothing."""
    positions = places(rows=3, slots=50)
    positions[1] += 7
    positions[2, :, 40:] = -1
    batch = RandomDraw(5).score(view_of(positions))
    order = torch.randperm(50)

    for row in range(3):
        alone = view_of(positions[row : row + 1])
        assert_close(RandomDraw(5).score(alone)[0], batch[row], rtol=0, atol=0)
        shuffled = view_of(positions[row : row + 1, :, order], in_order=False)
        assert_close(RandomDraw(5).score(shuffled)[0], batch[row][:, order], rtol=0, atol=0)


def test_the_hash_is_that_of_its_author():
    """lowbias32 of some words, computed with Python's integers."""
    words = [0, 1, 12345, 2**31, 2**32 - 1]

    def hashed(word):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            word = ((word ^ (word >> shift)) * factor) % 2**32
        return word ^ (word >> 16)

    assert mixed(torch.tensor(words)).tolist() == [hashed(word) for word in words]
