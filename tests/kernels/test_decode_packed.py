"""Decode attention over quantised and float8 entries, with tails that are not packed."""

import pytest
import torch

from kvpolicy_kernels.division import Division
from tests.kernels.cases import DTYPES, SMALL
from tests.kernels.decoding import MIXED, assert_right, call, channels, fp8, run, tokens


@pytest.mark.parametrize("listed", [0, 20], ids=["", "listed"])
@pytest.mark.parametrize("which", ["keys", "values", "both"])
@pytest.mark.parametrize(("dim", "dtype"), list(zip([64, 80, 128], DTYPES, strict=True)))
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantised_entries_with_tails(bits, dim, which, listed, dtype):
    keys = channels(bits, dim) if which != "values" else None
    values = tokens(bits, dim) if which != "keys" else None
    one = call(MIXED, dim, dtype, keys=keys, values=values, listed=listed, seed=bits + dim + listed)
    assert_right(one, Division(32, 64, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("unit", "dim"), [(8, 59), (24, 64), (64, 64)])
def test_units_that_do_not_fit_into_a_block(unit, dim, dtype):
    stored = {8: torch.float16, 24: torch.float32, 64: dtype}[unit]
    keys, values = channels(4, dim, unit, stored), tokens(4, dim, 1 if dim == 59 else 32, stored)
    assert_right(call(MIXED, dim, dtype, keys=keys, values=values, seed=unit), Division(16, 48, 2))


@pytest.mark.parametrize("listed", [0, 20], ids=["", "listed"])
@pytest.mark.parametrize(("dim", "dtype"), list(zip([59, 64, 128], DTYPES, strict=True)))
def test_float8_entries(dim, listed, dtype):
    one = call(MIXED, dim, dtype, keys=fp8(dim), values=fp8(dim), listed=listed, seed=dim, votes=True)
    assert_right(one, logits=True, mass=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", [fp8(64), channels(4, 64)], ids=["fp8", "quantised"])
def test_packed_keys_are_rounded_to_the_dtype_of_the_model(how, dtype):
    one = call(MIXED, 64, dtype, keys=how, seed=11)
    _, logits, _ = run(one, SMALL, logits=True)
    for queries, keys, found in zip(one.queries, one.keys, logits, strict=True):
        expected = one.scaling * (queries.double() @ keys.double().T)
        assert torch.allclose(found[:, : len(keys)].double(), expected, atol=2e-5, rtol=1e-5)
