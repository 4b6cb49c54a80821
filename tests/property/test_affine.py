"""Codes with a scale and a minimum: how far decoded numbers are from what was given."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvpolicy_plugins.codecs.shared.affine import dequantise, quantise
from tests.property.formats import affine, kv_formats, through
from tests.property.layers import generators


@given(kv_formats(affine("full"), dtypes=(torch.float32, torch.float64), least=1))
def test_the_error_is_at_most_half_a_step(given_format):
    kv_format, vectors, at = given_format
    columns = kv_format.encode(vectors, at)
    error = (kv_format.decode(columns, at) - vectors).abs()
    rounding = 8 * torch.finfo(vectors.dtype).eps * vectors.abs().max()
    assert (error <= steps(kv_format, columns) / 2 + rounding).all()


def steps(kv_format, columns):
    """The scale of each number [B, K, n, D]."""
    scale = columns["scale"]
    if kv_format.group_size > 1:
        return scale.repeat_interleave(kv_format.group_size, 2)
    scale = scale[:, 0].movedim(2, 1) if kv_format.joint else scale
    return scale.repeat_interleave(kv_format.group, -1)


@given(kv_formats(affine("half")))
def test_float16_scales_cost_no_more_than_they_must(given_format):
    kv_format, vectors, at = given_format
    columns = kv_format.encode(vectors, at)
    error = (kv_format.decode(columns, at).double() - vectors.double()).abs()
    largest = vectors.double().abs().amax() if vectors.numel() else 0.0
    rounding = 2 * torch.finfo(torch.float16).eps + torch.finfo(vectors.dtype).eps
    levels = 2**kv_format.bits - 1
    # A minimum that is rounded moves the grid, a scale that is rounded moves its end.
    allowed = (
        steps(kv_format, columns).double() * (0.5 + levels * torch.finfo(torch.float16).eps) + 2 * rounding * largest
    )
    assert (error <= allowed).all()


@given(st.integers(1, 8), st.sampled_from((torch.float32, torch.float64)), generators)
def test_the_ends_of_a_group_come_back(bits, dtype, random):
    groups = torch.randn(3, 4, 16, generator=random).to(dtype)
    codes, scales, minima = quantise(groups, -1, bits, dtype)
    decoded = dequantise(codes, scales, minima, dtype)
    assert torch.equal(decoded.amin(-1), groups.amin(-1))
    assert_close(decoded.amax(-1), groups.amax(-1), rtol=0, atol=16 * torch.finfo(dtype).eps)
    assert codes.amin() == 0
    assert codes.amax() == 2**bits - 1


@given(kv_formats(affine("full"), contents=("equal", "zero")))
def test_equal_numbers_come_back_exactly(given_format):
    kv_format, vectors, at = given_format
    assert torch.equal(through(kv_format, vectors, at), vectors)


@given(kv_formats(affine("full"), dtypes=(torch.float64,)))
def test_what_was_decoded_is_stored_exactly(given_format):
    kv_format, vectors, at = given_format
    if kv_format.joint:
        return  # the mean of what was decoded is another one
    once = through(kv_format, vectors, at)
    assert_close(through(kv_format, once, at), once, rtol=1e-12, atol=1e-12)
