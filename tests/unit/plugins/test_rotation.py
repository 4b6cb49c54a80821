"""A random rotation, then one codebook for all."""

import math

import pytest
import torch

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Geometry, Site
from kvpolicy.stages.conformance import Promises, conformance_cases
from kvpolicy_plugins.codecs.rotation import Rotation
from kvpolicy_plugins.codecs.shared import rotated
from kvpolicy_plugins.codecs.shared.codebook import codebook, edges_between
from kvpolicy_plugins.codecs.shared.packing import unpack
from kvpolicy_plugins.codecs.shared.rotated import hadamard

CASES = [
    pytest.param(check, id=f"{codec.bits} bits: {name}")
    for codec, error in (
        (Rotation(1), 1.0),
        (Rotation(2, 7), 0.6),
        (Rotation(3, residual=5), 0.4),
        (Rotation(scales="full"), 0.25),
    )
    for name, check in conformance_cases(codec, Promises(error=error))
]
LLOYD_MAX = {  # arXiv:2504.19874, section 3.1, and J. Max, Quantizing for minimum distortion, 1960
    1: ([0.79788], 0.3634),
    2: ([0.45278, 1.51042], 0.11748),
    3: ([0.24509, 0.75601, 1.34391, 2.15195], 0.03455),
    4: ([0.12840, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259], 0.00950),
}


@pytest.mark.parametrize("check", CASES)
def test_contract(check):
    check()


def form(dim, dtype=torch.float32, **parameters):
    return Rotation(**parameters).formats(Site(Geometry((0,), 1, 1, dim), dtype)).values


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_the_codebook_is_that_of_lloyd_and_max(bits):
    upper, error = LLOYD_MAX[bits]
    half = 2 ** (bits - 1)
    assert codebook(bits)[half:] == pytest.approx(upper, abs=1e-5)
    assert codebook(bits)[:half] == tuple(-number for number in reversed(codebook(bits)[half:]))
    numbers = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    density = (-numbers.square() / 2).exp() / math.sqrt(2 * math.pi) * 18 / 200_000
    nearest = torch.tensor(codebook(bits), dtype=torch.float64)[
        torch.bucketize(numbers, torch.tensor(edges_between(codebook(bits)), dtype=torch.float64))
    ]
    assert ((numbers - nearest).square() * density).sum().item() == pytest.approx(error, abs=5e-5)


@pytest.mark.parametrize("bits", LLOYD_MAX)
@pytest.mark.parametrize("content", ["normal", "one hot", "smooth"])
def test_the_error_is_that_of_the_codebook_whatever_the_vectors(bits, content):
    random = torch.Generator().manual_seed(0)
    vectors = {
        "normal": torch.randn(1, 1, 500, 128, generator=random),
        "one hot": 50 * torch.eye(128)[None, None],
        "smooth": torch.randn(1, 1, 500, 128, generator=random).cumsum(-1),
    }[content]
    half = form(128, bits=bits)
    at = torch.zeros(vectors.shape[:3])
    error = (half.decode(half.encode(vectors, at), at) - vectors).square().sum() / vectors.square().sum()
    # A vector with one number, rotated, is all 1 and -1: the error is the distance of 1 from its code.
    expected = LLOYD_MAX[bits][1] if content != "one hot" else min((1 - code) ** 2 for code in codebook(bits))
    assert error.item() == pytest.approx(expected, rel=0.3 if content == "smooth" else 0.03)


def test_codes_and_norms_of_a_vector():
    half = form(4, bits=2, scales="full")
    signs = torch.tensor(half.signs)
    columns = half.encode(3.0 * signs[None, None, None], torch.zeros(1, 1, 1))
    assert columns["norm"].item() == 6
    assert unpack(columns["codes"], 2, 4).flatten().tolist() == [3, 1, 1, 1]  # rotated: 2, 0, 0, 0


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_a_zero_vector_has_the_codes_nearest_to_zero(bits):
    columns = form(8, bits=bits).encode(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1))
    assert columns["norm"].item() == 0
    assert unpack(columns["codes"], bits, 8).unique().item() in (2 ** (bits - 1) - 1, 2 ** (bits - 1))


def test_a_norm_beyond_all_numbers_is_bounded():
    half = form(16, scales="full")
    vectors = torch.full((1, 1, 1, 16), torch.finfo(torch.float32).max)
    columns = half.encode(vectors, torch.zeros(1, 1, 1))
    assert columns["norm"].isfinite()
    assert half.decode(columns, torch.zeros(1, 1, 1)).isfinite().all()


def test_the_seed_decides_the_signs():
    signs = [form(64, seed=seed).signs for seed in (0, 0, 1)]
    assert signs[0] == signs[1] != signs[2]
    assert set(signs[0]) == {1, -1}
    assert form(64, residual=9).packed_length(42) == 32


@pytest.mark.parametrize("dim", [48, 80, 96])
def test_the_head_dimension_must_be_a_power_of_two(dim):
    with pytest.raises(ParameterError, match=f"^rotation: must have a head dimension that is a power of two: {dim}$"):
        form(dim)


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_bytes_of_a_vector(bits):
    half = form(128, torch.bfloat16, bits=bits)
    assert sum(column.bytes_per_slot for column in half.columns.values()) == 128 * bits / 8 + 2


def test_what_was_first_used_in_inference_mode_can_be_differentiated():
    rotated._sylvester.cache_clear()
    vectors = torch.ones(3, 16)
    with torch.inference_mode():
        hadamard(vectors)
    vectors.requires_grad_()
    hadamard(vectors).square().sum().backward()
    torch.testing.assert_close(vectors.grad, 2 * 16 * vectors)
