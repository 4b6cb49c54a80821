"""Redundancy beyond one block, and what its parameters decide."""

import pytest
import torch
from torch.testing import assert_close

from kvpolicy_plugins.scorers.redundancy import Redundancy
from tests import references
from tests.views import view_of


def clustered(slots, centres):
    random = torch.Generator().manual_seed(5)
    middle = torch.randn(centres, 24, generator=random)
    which = torch.randint(centres, (slots,), generator=random)
    return (middle[which] + 0.3 * torch.randn(slots, 24, generator=random))[None, None]


@pytest.mark.parametrize("end", ["last", "first"])
@pytest.mark.parametrize(("forgive", "empty_row"), [(0, "slot0"), (1, "none"), (3, "slot0")])
def test_several_blocks(end, forgive, empty_row):
    keys = clustered(1100, 30)
    found = Redundancy(0.5, forgive, end, empty_row).score(view_of(keys))[0, 0]
    expected = references.redundancy(keys[0, 0], 0.5, forgive, end, empty_row)
    assert_close(found.double(), expected, atol=1e-8, rtol=1e-5)


def test_nothing_grows_with_the_square_of_the_length(monkeypatch):
    largest = 0
    multiply = torch.Tensor.__matmul__

    def watched(left, right):
        nonlocal largest
        product = multiply(left, right)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    Redundancy().score(view_of(clustered(2000, 3)))
    assert largest <= 512 * 128


def test_the_newest_of_a_cluster_is_the_least_redundant():
    keys = torch.eye(16)[torch.tensor([0, 0, 0, 1, 0, 2])][None, None]
    scores = Redundancy(empty_row="none").score(view_of(keys))[0, 0]
    assert scores[4] == scores[[0, 1, 2, 4]].amin()


def test_a_key_that_is_not_a_number_spoils_its_own_head_only():
    keys = clustered(20, 3).repeat(1, 2, 1, 1)
    keys[0, 0, 3] = torch.nan
    scores = Redundancy().score(view_of(keys))
    assert scores[0, 0].isnan().all()
    assert scores[0, 1].isfinite().all()
