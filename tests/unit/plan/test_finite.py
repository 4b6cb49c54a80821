"""Which vectors are finite."""

import pytest
import torch

from kvpolicy.plan.compress.finite import is_finite

WRONG = (torch.nan, torch.inf, -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_number_that_is_not_finite_spoils_its_vector_and_no_other(dtype):
    largest = torch.finfo(dtype).max
    vectors = torch.tensor([largest, -largest, 0.0], dtype=torch.float64).to(dtype).expand(4, 3).clone()
    assert is_finite(vectors).all()
    for row, number in enumerate(WRONG):
        vectors[row, row] = number
    vectors[0, 1] = torch.inf  # beside NaN
    assert is_finite(vectors).tolist() == [False, False, False, True]


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_no_numbers_are_finite(shape):
    assert is_finite(torch.zeros(shape, dtype=torch.float32)).tolist() == [True] * shape[0]
