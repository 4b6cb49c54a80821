"""Decode attention over quantised and float8 entries, with tails that are not packed."""

import attrs
import pytest
import torch

from kvpolicy_kernels import UnsupportedInputError
from kvpolicy_kernels.attention.split_plan import SplitPlan
from tests.kernels.attention.decoding import (
    ALIKE,
    MIXED,
    SMALL,
    assert_right,
    call,
    channels,
    float8,
    levels,
    means,
    run,
    tokens,
    vectors_of,
)
from tests.kernels.scenes import DTYPES


@pytest.mark.parametrize("listed", [0, 20], ids=["", "listed"])
@pytest.mark.parametrize("which", ["keys", "values", "both"])
@pytest.mark.parametrize(("dim", "dtype"), list(zip([64, 80, 128], DTYPES, strict=True)))
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantised_entries_with_tails(bits, dim, which, listed, dtype):
    keys = channels(bits, dim) if which != "values" else None
    values = tokens(bits, dim) if which != "keys" else None
    one = call(MIXED, dim, dtype, keys=keys, values=values, listed=listed, seed=bits + dim + listed)
    assert_right(one, SplitPlan(32, 64, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("unit", "dim"), [(8, 59), (24, 64), (64, 64)])
def test_units_that_do_not_fit_into_a_block(unit, dim, dtype):
    stored = {8: torch.float16, 24: torch.float32, 64: dtype}[unit]
    keys, values = channels(4, dim, unit, stored), tokens(4, dim, 1 if dim == 59 else 32, stored)
    assert_right(call(MIXED, dim, dtype, keys=keys, values=values, seed=unit), SplitPlan(16, 48, 2))


@pytest.mark.parametrize("listed", [0, 20], ids=["", "listed"])
@pytest.mark.parametrize(("dim", "dtype"), list(zip([59, 64, 128], DTYPES, strict=True)))
def test_float8_entries(dim, listed, dtype):
    one = call(MIXED, dim, dtype, keys=float8(dim), values=float8(dim), listed=listed, seed=dim, votes=True)
    assert_right(one, logits=True, mass=True)


@pytest.mark.parametrize("listed", [0, 20], ids=["", "listed"])
@pytest.mark.parametrize(("dim", "dtype"), list(zip([59, 64, 128], DTYPES, strict=True)))
def test_float8_entries_without_a_scale(dim, listed, dtype):
    how = float8(dim, scaled=False)
    one = call(MIXED, dim, dtype, values=how, listed=listed, seed=dim, votes=True)
    assert_right(one, logits=True, mass=True)
    small = attrs.evolve(call(MIXED, dim, dtype, keys=how, listed=listed, seed=dim), scaling=1e-3)  # keys up to 448
    assert_right(small, SMALL, logits=True, mass=True)


@pytest.mark.parametrize("listed", [0, 20], ids=["", "listed"])
@pytest.mark.parametrize("dim", [4, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_entries_of_a_codebook(bits, dim, listed):
    dtype = DTYPES[(bits + dim.bit_length()) % len(DTYPES)]
    how = levels(bits, dim, torch.float16 if bits % 2 else dtype)
    one = call(MIXED, dim, dtype, keys=how, values=how, listed=listed, seed=bits + dim, votes=True, positions=True)
    assert_right(one, SplitPlan(16, 48, 2), logits=True, mass=True)


@pytest.mark.parametrize("listed", [0, 20], ids=["", "listed"])
@pytest.mark.parametrize(("dim", "dtype"), list(zip([59, 64, 80], DTYPES, strict=True)))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_vectors_with_one_scale(bits, dim, listed, dtype):
    how = vectors_of(bits, dim, dtype if bits == 3 else torch.float16)
    one = call(MIXED, dim, dtype, keys=how if bits == 2 else None, values=how, listed=listed, seed=bits + dim)
    assert_right(one, SplitPlan(32, 64, 2))


@pytest.mark.parametrize("listed", [0, 20], ids=["", "listed"])
@pytest.mark.parametrize("which", ["keys", "values", "both"])
@pytest.mark.parametrize(("dim", "dtype"), list(zip([64, 80, 128], DTYPES, strict=True)))
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_entries_of_all_heads_in_one_unit(bits, dim, which, listed, dtype):
    how = means(bits, dim, group=16 if bits == 4 else dim & -dim, stored=dtype if bits == 8 else torch.float16)
    keys, values = how if which != "values" else None, how if which != "keys" else None
    one = call(ALIKE, dim, dtype, keys=keys, values=values, listed=listed, seed=bits + dim + listed)
    assert_right(one, SplitPlan(32, 64, 2))


def test_units_of_other_segments_are_refused():
    one = call(ALIKE, 64, keys=means(4, 64))
    packed = one.kv.keys.packed
    for names in (("starts",), ("groups",), ("starts", "groups")):
        other = attrs.evolve(packed, **{name: getattr(packed, name).repeat(2) for name in names})
        kv = attrs.evolve(one.kv, keys=attrs.evolve(one.kv.keys, packed=other))
        with pytest.raises(UnsupportedInputError, match="packed groups of other segments"):
            run(attrs.evolve(one, kv=kv))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", [float8(64), channels(4, 64), levels(3, 64)], ids=["fp8", "quantised", "codebook"])
def test_packed_keys_are_rounded_to_the_dtype_of_the_model(how, dtype):
    one = call(MIXED, 64, dtype, keys=how, seed=11)
    _, logits, _ = run(one, SMALL, logits=True)
    for queries, keys, found in zip(one.queries, one.keys, logits, strict=True):
        expected = one.scaling * (queries.double() @ keys.double().T)
        assert torch.allclose(found[:, : len(keys)].double(), expected, atol=2e-5, rtol=1e-5)
