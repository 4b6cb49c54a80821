"""Float8 with a scale for each vector."""

import pytest
import torch

from kvpolicy.stages import Geometry, Site
from kvpolicy.stages.conformance import Promises, conformance_cases
from kvpolicy_plugins.codecs.fp8 import Fp8

CASES = [
    pytest.param(check, id=f"{number}: {name}")
    for number, codec in enumerate((Fp8(), Fp8(7)))
    for name, check in conformance_cases(codec, Promises(error=0.04))
]


@pytest.mark.parametrize("check", CASES)
def test_contract(check):
    check()


def form(dim, dtype=torch.float32, residual=0):
    return Fp8(residual).formats(Site(Geometry((0,), 1, 1, dim), dtype)).keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_code_means_what_float8_means(dtype):
    codes = torch.tensor([code for code in range(256) if code % 128 != 127], dtype=torch.uint8)  # 127 and 255 are NaN
    columns = {"codes": codes[None, None, None], "peak": torch.full((1, 1, 1), 448.0, dtype=torch.float16)}
    decoded = form(len(codes), dtype).decode(columns, torch.zeros(1, 1, 1))
    assert torch.equal(decoded.flatten(), codes.view(torch.float8_e4m3fn).to(dtype))


def test_numbers_are_rounded_to_the_nearest_code():
    numbers = torch.randn(1, 1, 50, 16, generator=torch.Generator().manual_seed(3))
    numbers[..., 0] = 448.0
    columns = form(16).encode(numbers, torch.zeros(1, 1, 50))
    assert torch.equal(columns["codes"], numbers.to(torch.float8_e4m3fn).view(torch.uint8))
    assert columns["codes"].dtype == torch.uint8


def test_a_larger_vector_that_comes_later_does_not_saturate():
    half = form(8)
    vectors = torch.tensor([1e-3, 1.0, 3e4])[None, None, :, None] * torch.linspace(-1, 1, 8)
    decoded = half.decode(half.encode(vectors, torch.zeros(1, 1, 3)), torch.zeros(1, 1, 3))
    torch.testing.assert_close(decoded, vectors, rtol=1 / 16, atol=0)


def test_a_peak_that_is_rounded_down_does_not_give_nan():
    vectors = torch.full((1, 1, 1, 4), 1 + 2**-11 - 2**-20)  # rounds to 1 in float16
    columns = form(4).encode(vectors, torch.zeros(1, 1, 1))
    assert columns["peak"].item() == 1
    assert torch.equal(form(4).decode(columns, torch.zeros(1, 1, 1)), torch.ones(1, 1, 1, 4))
    beyond = form(4).encode(vectors * 1e6, torch.zeros(1, 1, 1))
    decoded = form(4).decode(beyond, torch.zeros(1, 1, 1))
    torch.testing.assert_close(decoded, torch.full((1, 1, 1, 4), 65504.0))


def test_zeros_are_zeros_and_what_float16_cannot_tell_from_zero_too():
    columns = form(4).encode(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1))
    assert not columns["codes"].any()
    assert not columns["peak"].any()
    columns = form(4).encode(torch.full((1, 1, 1, 4), 1e-9), torch.zeros(1, 1, 1))
    assert not form(4).decode(columns, torch.zeros(1, 1, 1)).any()


def test_half_the_bytes_of_half_precision():
    geometry = Geometry((0,), 1, 1, 128)
    assert form(128, torch.bfloat16).nbytes(100, geometry, torch.bfloat16) == 96 * 130 + 16 * 256
    assert form(128, torch.bfloat16, residual=10).packed_length(100) == 80
