"""Which packed groups are decoded: those that are asked for, each once; a bound of how many there are is enough."""

import pytest
import torch

from kvpolicy.cache.storage.kv_tensor import _distinct


@pytest.mark.parametrize("extra", [None, 0, 1, 5])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (1, 2, 0)])
def test_every_number_is_found_among_the_distinct_ones(shape, extra):
    units = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(1))
    most = max((len(row.unique()) for row in units.flatten(0, 1)), default=0) if units.numel() else 0
    distinct, place = _distinct(units, None if extra is None or not units.numel() else most + extra)

    assert distinct.shape == (*shape[:2], most + (extra or 0) if units.numel() else 0)
    assert torch.equal(distinct.gather(-1, place), units)
    for row, found in zip(units.flatten(0, 1), distinct.flatten(0, 1), strict=True):
        assert torch.equal(row.unique(), found.unique())
