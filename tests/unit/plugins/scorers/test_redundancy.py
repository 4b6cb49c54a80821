"""Redundancy beyond one block, and what its parameters decide."""

import pytest
import torch
from torch.testing import assert_close

from kvpolicy_plugins.scorers.attention_free.redundancy import Redundancy
from kvpolicy_plugins.scorers.shared import similar_keys
from tests.support import references
from tests.support.views import view_of


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


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("forgive", [1, 2, 5])
@pytest.mark.parametrize("native", [True, False])
def test_every_way_of_searching_finds_the_same(native, forgive, last, monkeypatch):
    monkeypatch.setattr(similar_keys, "multiplies_bfloat16", lambda device: native)
    monkeypatch.setattr(similar_keys, "_ROWS", 100)
    monkeypatch.setattr(similar_keys, "_COLUMNS", (32, 128))
    keys = torch.stack([clustered(700, 40)[0, 0], clustered(700, 4)[0, 0].flip(0)])
    directions = torch.nn.functional.normalize(keys, dim=-1)
    valid = torch.ones(2, 700, dtype=torch.bool)
    valid[1, 600:] = False
    directions[1, 600:] = 0
    expected = similar_keys.by_blocks(directions, 0.5, forgive, last=last)
    found = similar_keys.forgiven_similarity(directions, valid, 0.5, forgive, last=last)
    assert_close(found[0], expected[0], atol=1e-4, rtol=1e-5)
    assert torch.equal(found[1], expected[1])
    assert 0 < found[1].sum() <= 1300


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("width", [1, 7, 64, 256])
def test_a_product_in_bfloat16_rules_out_no_look_alike(width, seed):
    random = torch.Generator().manual_seed(seed)
    one = torch.nn.functional.normalize(torch.randn(300, width, generator=random), dim=-1)
    exact = one.double() @ one.double().T
    coarse = (one.bfloat16() @ one.bfloat16().T).double()
    assert (coarse > exact - similar_keys._MARGIN).all()


def test_nothing_grows_with_the_square_of_the_length(monkeypatch):
    largest = 0
    multiply = torch.Tensor.__matmul__

    def watched(left, right):
        nonlocal largest
        product = multiply(left, right)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    keys = torch.randn(1, 1, 4000, 24, generator=torch.Generator().manual_seed(1))
    Redundancy(0.99).score(view_of(keys))
    assert largest == 1024**2


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
