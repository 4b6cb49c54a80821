"""Seeded draws: normal where they should be, and the same for a row whatever is beside it."""

import pytest
import torch

from kvpolicy_plugins.shared.seeded_draws import normal, sketch

CPU = torch.device("cpu")


def test_draws_are_normal():
    """Mean, variance and the share beyond two deviations, of 65,536 numbers: within five standard errors."""
    draws = normal(3, 1, torch.arange(2**16), device=CPU).double()

    assert draws.isfinite().all()
    assert abs(float(draws.mean())) < 5 / 256
    assert abs(float(draws.var()) - 1) < 5 * 2**0.5 / 256
    assert abs(float((draws.abs() > 2).double().mean()) - 0.0455) < 5 * 0.2084 / 256


@pytest.mark.parametrize("other", [(1, 0, 9), (0, 1, 9), (0, 0, 10)], ids=["seed", "layer", "position"])
def test_sketches_differ(other):
    """By seed, layer and newest position: the correlation of 4,096 pairs is below 0.08."""
    seed, layer, newest = other
    drawn = sketch(0, 0, torch.tensor([9]), 64, 64), sketch(seed, layer, torch.tensor([newest]), 64, 64)

    assert abs(float(torch.corrcoef(torch.stack([one.flatten() for one in drawn]))[0, 1])) < 0.08


def test_a_row_has_the_sketch_that_it_has_alone():
    newest = torch.tensor([9, 4, 2**25 + 1])
    together = sketch(5, 2, newest, 7, 3)

    assert together.shape == (3, 1, 7, 3)
    for row in range(3):
        assert torch.equal(sketch(5, 2, newest[row : row + 1], 7, 3)[0], together[row])


def test_a_sketch_keeps_squared_norms_on_average():
    vectors = torch.eye(16)
    squares = (vectors @ sketch(0, 0, torch.arange(400), 16, 8)).square().sum(-1)

    assert abs(float(squares.mean()) - 1) < 0.05
