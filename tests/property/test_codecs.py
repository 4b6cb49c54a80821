"""What holds for each codec by itself: bytes in closed form, what it holds exactly, how far off it may be."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvpolicy.stages import Geometry, Site
from kvpolicy_plugins.codecs.fp8 import Fp8
from kvpolicy_plugins.codecs.kivi import Kivi
from kvpolicy_plugins.codecs.rotation import Rotation
from kvpolicy_plugins.codecs.shared.hadamard import hadamard
from kvpolicy_plugins.codecs.tada import Tada
from kvpolicy_plugins.codecs.turboquant import TurboQuant
from tests.property.formats import BITS, FLOATS, through
from tests.property.layers import generators


@given(
    BITS, BITS, st.sampled_from((8, 16)), st.integers(1, 4), st.integers(0, 500), st.integers(1, 8), st.integers(1, 20)
)
def test_bytes_of_kivi_are_the_closed_form(key_bits, value_bits, group, steps, length, heads, batch):
    dim, residual = 32, group * steps
    geometry = Geometry((0,), heads, heads, dim)
    formats = Kivi(key_bits, value_bits, group, residual, batch=batch).formats(Site(geometry, torch.bfloat16))
    keys, values = formats.keys.packed_length(length), formats.values.packed_length(length)
    assert keys == length - length % residual
    assert values == max(0, length - residual) // batch * batch
    tails = [half.residual_capacity(length) for half in (formats.keys, formats.values)]
    codes = keys * dim * heads * key_bits / 8 + values * dim * heads * value_bits / 8
    scales = 2 * 2 * (keys / group) * dim * heads + 4 * values * (dim / group) * heads
    found = sum(half.nbytes(length, geometry, torch.bfloat16) for half in (formats.keys, formats.values))
    assert math.isclose(found * heads, codes + scales + 2 * dim * heads * sum(tails))


@given(BITS, st.sampled_from((0, 8, 32)), st.integers(1, 8), st.integers(0, 500))
def test_bytes_of_tada_are_the_closed_form(bits, group, heads, length):
    dim, residual = 32, 7
    geometry = Geometry((0,), heads, heads, dim)
    half = Tada(bits, group, residual, batch=1).formats(Site(geometry, torch.bfloat16)).values
    packed = max(0, length - residual)
    assert half.packed_length(length) == packed
    share = bits / 16 + 1 / heads + 2 / (group or dim)
    found = half.nbytes(length, geometry, torch.bfloat16) - 2 * dim * half.residual_capacity(length)
    assert math.isclose(found, 2 * dim * packed * share, abs_tol=1e-9)


@given(BITS, generators, st.sampled_from((2, 4)))
def test_what_all_heads_share_costs_tada_nothing(bits, random, heads):
    site = Site(Geometry((0,), heads, heads, 16), torch.float64)
    half = Tada(bits, scales="full").formats(site).keys
    vectors = torch.randn(2, heads, 5, 16, generator=random, dtype=torch.float64)
    at = torch.arange(5).expand(2, heads, 5)
    shared = torch.randint(-1000, 1000, (2, 1, 5, 16), generator=random).double()
    before, after = half.encode(vectors, at), half.encode(vectors + shared, at)
    assert torch.equal(before["codes"], after["codes"])
    for name in ("scale", "minimum"):
        assert_close(before[name], after[name], rtol=0, atol=1e-11)
    alike = vectors[:, :1].expand_as(vectors)
    assert torch.equal(through(half, alike, at), alike)


@given(BITS, generators)
def test_tada_holds_a_single_head_exactly(bits, random):
    half = Tada(bits, scales="full").formats(Site(Geometry((0,), 4, 1, 16), torch.float32)).keys
    vectors = torch.randn(2, 1, 5, 16, generator=random)
    assert torch.equal(through(half, vectors, torch.arange(5).expand(2, 1, 5)), vectors)


@given(generators)
def test_an_outlier_channel_of_all_heads_costs_tada_little(random):
    vectors = torch.randn(2, 8, 9, 32, generator=random)
    vectors[..., 3] += 40
    at = torch.arange(9).expand(2, 8, 9)
    site = Site(Geometry((0,), 8, 8, 32), torch.float32)
    centred = through(Tada(2).formats(site).keys, vectors, at)
    raw = through(Kivi(2, group=32, residual=32).formats(site).values, vectors, at)
    assert 10 * (centred - vectors).square().mean() < (raw - vectors).square().mean()


@given(generators, st.sampled_from((1, 2, 8, 32, 64, 128)))
def test_a_rotation_keeps_inner_products(random, dim):
    queries, keys = torch.randn(2, 7, dim, generator=random, dtype=torch.float64)
    found = (hadamard(queries) * hadamard(keys)).sum(-1)
    assert_close(found, dim * (queries * keys).sum(-1), rtol=1e-10, atol=1e-9)
    assert_close(hadamard(hadamard(keys)), dim * keys, rtol=1e-12, atol=1e-10)


@given(st.integers(1, 4), generators, st.floats(-20, 10))
def test_a_rotated_vector_scales_with_its_norm(bits, random, power):
    half = Rotation(bits, scales="full").formats(Site(Geometry((0,), 1, 1, 32), torch.float64)).keys
    vectors = torch.randn(1, 1, 6, 32, generator=random, dtype=torch.float64)
    at = torch.arange(6).expand(1, 1, 6)
    assert_close(through(half, vectors * 2**power, at), through(half, vectors, at) * 2**power, rtol=1e-9, atol=1e-12)


@given(st.integers(1, 4), st.integers(2, 4), generators, st.sampled_from((8, 64)), st.floats(-8, 8))
def test_turboquant_keeps_norms_and_is_within_half_a_step(key_bits, value_bits, random, dim, power):
    formats = TurboQuant(key_bits, value_bits).formats(Site(Geometry((0,), 2, 2, dim), torch.float32))
    vectors = torch.randn(1, 2, 5, dim, generator=random) * 2**power
    at = torch.arange(5).expand(1, 2, 5)
    half = 2**-11  # relative error of a float16; below 2^-14 the error is 2^-25
    keys, norms = through(formats.keys, vectors, at), vectors.norm(dim=-1)
    assert_close(keys.norm(dim=-1), norms, rtol=half + 1e-5, atol=2**-25)
    columns = formats.keys.encode(vectors, at)
    scaled = formats.keys.encode(vectors * 4, at)
    assert torch.equal(columns["codes"], scaled["codes"])
    values = through(formats.values, vectors, at)
    low, high = vectors.amin(-1, keepdim=True), vectors.amax(-1, keepdim=True)
    rounding = half * (high - low + low.abs()) + 2**-25 * 2**value_bits
    assert ((values - vectors).abs() <= (high - low) / (2**value_bits - 1) * (0.5 + 1e-4) + rounding).all()


@given(generators, st.sampled_from(FLOATS), st.floats(-6, 6))
def test_fp8_is_within_a_sixteenth_of_each_number(random, dtype, power):
    half = Fp8().formats(Site(Geometry((0,), 1, 1, 32), dtype)).keys
    vectors = (torch.randn(1, 1, 6, 32, generator=random) * 2**power).to(dtype)
    error = (through(half, vectors, torch.arange(6).expand(1, 1, 6)).double() - vectors.double()).abs()
    peak = vectors.double().abs().amax(-1, keepdim=True)
    # Half a place of 3 bits; below the smallest normal number of e4m3, half a place of that.
    allowed = vectors.double().abs() / 16 + peak / 448 * 2**-10 + peak * 1e-3 + 4 * torch.finfo(dtype).eps * peak
    assert (error <= allowed).all()
