"""Codes, scales and minima as torch computes them, bit for bit; numbers as near as torch's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy_kernels import UnsupportedInputError
from kvpolicy_kernels.quantise import quantise_channels, quantise_tokens
from tests.kernels.counting import counted
from tests.kernels.quantise.quantising import (
    CHANNELS,
    DTYPES,
    TOKENS,
    by_kernel,
    by_torch,
    check,
    exact_numbers,
    vectors_of,
)
from tests.kernels.scenes import DEVICE
from tests.support.examples import examples


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", [1, 2, 31, 32, 128])
@pytest.mark.parametrize("dim", [59, 64, 80])
def test_channels(dim, unit, dtype, bits):
    kind = ["normal", "outliers", "grid", "offset"][(dim + unit + bits // 2) % 4]
    vectors = vectors_of((2, 2 * unit, dim), dtype, seed=unit, kind=kind)[0]
    check(CHANNELS, vectors, unit, bits, DTYPES[(dim + unit) % 3])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "group"), [(64, 32), (128, 32), (128, 8), (80, 20), (80, 80), (59, 59), (1, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 65])
def test_tokens(tokens, dim, group, dtype, bits):
    kind = ["normal", "outliers", "grid", "offset"][(dim + group + tokens + bits // 2) % 4]
    vectors = vectors_of((2, tokens, dim), dtype, seed=tokens, kind=kind)[0]
    check(TOKENS, vectors, group, bits, DTYPES[(dim + tokens) % 3])


@settings(max_examples=examples(30))
@given(
    axis=st.sampled_from([CHANNELS, TOKENS]),
    sets=st.integers(1, 4),
    group=st.sampled_from([4, 8, 12, 16]),
    others=st.integers(1, 40),
    slabs=st.integers(1, 3),
    bits=st.sampled_from([2, 4, 8]),
    dtype=st.sampled_from(DTYPES),
    stored=st.sampled_from(DTYPES),
    kind=st.sampled_from(["normal", "outliers", "grid", "offset", "tiny", "large"]),
    seed=st.integers(0, 2**20),
)
def test_any_groups(axis, sets, group, others, slabs, bits, dtype, stored, kind, seed):
    shape = (slabs, sets * group, others) if axis == CHANNELS else (slabs, others, sets * group)
    check(axis, vectors_of(shape, dtype, seed=seed, kind=kind)[0], group, bits, stored)


@pytest.mark.parametrize("axis", [CHANNELS, TOKENS])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numbers_are_no_further_than_half_a_step(axis, bits):
    vectors = vectors_of((2, 64, 64), torch.float32, kind="outliers")[0]
    (_, scales, _), numbers = check(axis, vectors, 32, bits, torch.float32)
    wide = scales.cpu().repeat_interleave(32, 1 if axis == CHANNELS else 2).double()
    assert ((numbers - vectors.double()).abs() <= 0.5001 * wide + 1e-5).all()
    constant = vectors == 3.25
    assert torch.equal(numbers[constant], vectors.double()[constant]) or axis == TOKENS


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")  # NumPy's opinion
@pytest.mark.parametrize("axis", [CHANNELS, TOKENS])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_group(bad, stored, bits, axis):
    vectors = vectors_of((1, 32, 32), torch.float32)[0].to(DEVICE)
    clean = by_kernel(axis, vectors, 16, bits, stored)
    vectors[0, 18, 5] = bad
    found = by_kernel(axis, vectors, 16, bits, stored)
    spoilt = torch.zeros(1, 32, 32, dtype=torch.bool)
    if axis == CHANNELS:
        spoilt[0, 16:, 5] = True
        group = (0, 1, 5)
    else:
        spoilt[0, 18, :16] = True
        group = (0, 18, 0)
    before, after = (exact_numbers(axis, parts, 16, bits, 32) for parts in (clean, found))
    assert torch.equal(after[~spoilt], before[~spoilt])
    codes = by_torch(axis, vectors, 16, bits, stored)
    assert torch.equal(found[0].cpu(), codes[0])
    for one, other in zip(found[1:], codes[1:], strict=True):
        assert torch.equal(one.cpu().nan_to_num(7), other.nan_to_num(7))
        assert not math.isnan(bad) or one[group].isnan()


@pytest.mark.parametrize("axis", [CHANNELS, TOKENS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_vectors(axis, dtype):
    whole = vectors_of((2, 100, 40), dtype)[0].to(DEVICE)
    part = whole[:, 3:67, 4:36]
    found, again = (by_kernel(axis, one, 8, 4, torch.float16) for one in (part, part.contiguous()))
    assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("axis", [CHANNELS, TOKENS])
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("dim", [40, 60])
def test_traffic_is_what_kernels_address(dim, bits, axis):
    unit, group = 16, 20
    vectors = vectors_of((2, 48, dim), torch.bfloat16)[0].to(DEVICE)
    parts = by_kernel(axis, vectors, unit if axis == CHANNELS else group, bits, torch.float16)
    module = quantise_channels if axis == CHANNELS else quantise_tokens
    said = module.traffic(2, 48, dim, unit if axis == CHANNELS else group, bits, 2, 2)
    named = dict(zip(("codes", "scales", "minima"), parts, strict=True))
    with counted({"vectors": vectors, **named}) as seen:
        launch = quantise_channels.quantise_channels if axis == CHANNELS else quantise_tokens.quantise_tokens
        launch(vectors, unit if axis == CHANNELS else group, bits, torch.float16, out=parts)
    assert (seen.read, seen.written) == (said.read, said.written)
    out = torch.empty_like(vectors)
    with counted({"vectors": out, **named}) as seen:
        if axis == CHANNELS:
            quantise_channels.dequantise_channels(*parts, bits, torch.bfloat16, out=out)
        else:
            quantise_tokens.dequantise_tokens(*parts, dim, bits, torch.bfloat16, out=out)
    assert (seen.read, seen.written) == (said.written, said.read)


def test_what_kernels_cannot_do_is_refused():
    vectors = vectors_of((2, 32, 32), torch.float32)[0].to(DEVICE)
    half = torch.float16
    channels, tokens = quantise_channels.quantise_channels, quantise_tokens.quantise_tokens
    for launch in (channels, tokens):
        for arguments in (
            (vectors.double(), 16, 4, half),
            (vectors, 16, 4, torch.float64),
            (vectors, 16, 3, half),
            (vectors, 0, 4, half),
            (vectors, 12, 4, half),
            (vectors.mT, 16, 4, half),
            (vectors[0], 16, 4, half),
            (vectors.repeat(1, 1, 9), 16, 4, half),
        ):
            with pytest.raises(UnsupportedInputError):
                launch(*arguments)
    with pytest.raises(UnsupportedInputError, match="share a byte"):
        tokens(vectors, 2, 2, half)
    with pytest.raises(UnsupportedInputError):
        channels(vectors.repeat(1, 16, 1), 512, 4, half)
    codes, scales, minima = tokens(vectors, 16, 4, half)
    for arguments in (
        (codes, scales, minima.float(), 32, 4, half),
        (codes, scales, minima[:, :4], 32, 4, half),
        (codes[..., :3], scales, minima, 32, 4, half),
        (codes, scales, minima, 31, 4, half),
        (codes, scales, minima, 32, 4, torch.float64),
    ):
        with pytest.raises(UnsupportedInputError):
            quantise_tokens.dequantise_tokens(*arguments)
    codes, scales, minima = channels(vectors, 16, 4, half)
    for arguments in (
        (codes, scales[..., :3], minima, 4, half),
        (codes.mT, scales, minima, 4, half),
        (codes, scales, minima, 8, half),
        (codes[0], scales, minima, 4, half),
    ):
        with pytest.raises(UnsupportedInputError):
            quantise_channels.dequantise_channels(*arguments)
