"""What holds for the quantised stores whatever they are given."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvpolicy.stages import Geometry, Site
from kvpolicy_plugins.affine import dequantise, quantise
from kvpolicy_plugins.codecs.fp8 import Fp8
from kvpolicy_plugins.codecs.kivi import Kivi
from kvpolicy_plugins.codecs.rotation import Rotation, hadamard
from kvpolicy_plugins.codecs.tada import Tada
from kvpolicy_plugins.packing import pack, packed_size, unpack
from tests.property.layers import generators

BITS = st.sampled_from((2, 4, 8))
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GROUP = 8


def _outliers(random, *shape):
    return torch.randn(*shape, generator=random) * torch.ones(shape[-1]).index_fill_(0, torch.tensor([1]), 100.0)


CONTENTS = {
    "normal": lambda random, *shape: torch.randn(*shape, generator=random),
    "outlier channel": _outliers,
    "far from zero": lambda random, *shape: 50 + torch.randn(*shape, generator=random),
    "equal": lambda random, *shape: torch.full(shape, torch.randn((), generator=random).item()),
    "zero": lambda random, *shape: torch.zeros(shape),
    "one entry": lambda random, *shape: torch.zeros(shape).index_fill_(2, torch.tensor([0])[: shape[2]], 3.0),
}
EXTREME = {
    "tiny": lambda random, *shape: 1e-40 * torch.randn(*shape, generator=random),
    "beyond half": lambda random, *shape: 1e6 * torch.randn(*shape, generator=random),
    "largest": lambda random, *shape: torch.randn(*shape, generator=random).sign() * torch.finfo(torch.float32).max,
}
codecs = st.one_of(
    st.builds(
        Kivi, BITS, BITS, group=st.just(GROUP), residual=st.just(GROUP), scales=st.sampled_from(("half", "full"))
    ),
    st.builds(Tada, BITS, group=st.sampled_from((0, GROUP)), scales=st.sampled_from(("half", "full"))),
    st.builds(Rotation, st.integers(1, 4), st.integers(0, 3), scales=st.sampled_from(("half", "full"))),
    st.just(Fp8()),
)


@st.composite
def halves(draw, kinds=codecs, contents=tuple(CONTENTS), dtypes=FLOATS, least=0):
    """One half of a layer's store, and vectors [B, K, n, D] with their positions: B 1-3, K 1-4, D 8-64."""
    batch, heads, dim = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.sampled_from((8, 16, 64)))
    dtype = draw(st.sampled_from(dtypes))
    formats = draw(kinds).formats(Site(Geometry((0,), heads, heads, dim), dtype))
    half = draw(st.sampled_from((formats.keys, formats.values)))
    shape = batch, heads, half.unit * draw(st.integers(least, 5)), dim
    vectors = ({**CONTENTS, **EXTREME}[draw(st.sampled_from(contents))])(draw(generators), *shape)
    largest = torch.finfo(dtype).max
    return half, vectors.double().clamp(-largest, largest).to(dtype), torch.arange(shape[2]).expand(shape[:3])


def through(half, vectors, at):
    return half.decode(half.encode(vectors, at), at)


def affine(scales):
    kivi = st.builds(Kivi, BITS, BITS, group=st.just(GROUP), residual=st.just(GROUP), scales=st.just(scales))
    return st.one_of(kivi, st.builds(Tada, BITS, group=st.sampled_from((0, GROUP)), scales=st.just(scales)))


@given(st.integers(1, 8), st.lists(st.integers(0, 3), max_size=2), st.integers(0, 70), generators)
def test_packed_codes_come_back(bits, shape, count, random):
    codes = torch.randint(2**bits, (*shape, count), dtype=torch.uint8, generator=random)
    packed = pack(codes, bits)
    assert packed.shape == (*shape, packed_size(count, bits))
    assert torch.equal(unpack(packed, bits, count), codes)
    flat = packed.reshape(-1, packed.shape[-1]) if packed.numel() else []
    for row, own in zip(flat, codes.reshape(-1, count) if len(flat) else [], strict=True):
        number = sum(code << place * bits for place, code in enumerate(own.tolist()))
        assert int.from_bytes(bytes(row.tolist()), "little") == number


@given(st.integers(1, 8), generators, st.booleans())
def test_packing_reads_tensors_however_they_lie(bits, random, flipped):
    codes = torch.randint(2**bits, (3, 33, 5), dtype=torch.uint8, generator=random)
    before = codes.clone()
    part = codes.mT[..., 1:] if flipped else codes[1:, :, 2:]
    packed = pack(part, bits)
    assert torch.equal(packed, pack(part.clone(memory_format=torch.contiguous_format), bits))
    inside = torch.full((*packed.shape[:-1], packed.shape[-1] + 3), 255, dtype=torch.uint8)
    inside[..., 3:] = packed
    assert torch.equal(unpack(inside[..., 3:], bits, part.shape[-1]), part)
    assert torch.equal(codes, before)


@given(halves(affine("full"), dtypes=(torch.float32, torch.float64), least=1))
def test_the_error_is_at_most_half_a_step(given_half):
    half, vectors, at = given_half
    columns = half.encode(vectors, at)
    error = (half.decode(columns, at) - vectors).abs()
    rounding = 8 * torch.finfo(vectors.dtype).eps * vectors.abs().max()
    assert (error <= steps(half, columns) / 2 + rounding).all()


def steps(half, columns):
    """The scale of each number [B, K, n, D]."""
    scale = columns["scale"]
    if half.unit > 1:
        return scale.repeat_interleave(half.unit, 2)
    scale = scale[:, 0].movedim(2, 1) if half.joint else scale
    return scale.repeat_interleave(half.group, -1)


@given(halves(affine("half")))
def test_float16_scales_cost_no_more_than_they_must(given_half):
    half, vectors, at = given_half
    columns = half.encode(vectors, at)
    error = (half.decode(columns, at).double() - vectors.double()).abs()
    largest = vectors.double().abs().amax() if vectors.numel() else 0.0
    rounding = 2 * torch.finfo(torch.float16).eps + torch.finfo(vectors.dtype).eps
    levels = 2**half.bits - 1
    # A minimum that is rounded moves the grid, a scale that is rounded moves its end.
    allowed = steps(half, columns).double() * (0.5 + levels * torch.finfo(torch.float16).eps) + 2 * rounding * largest
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


@given(halves(affine("full"), contents=("equal", "zero")))
def test_equal_numbers_come_back_exactly(given_half):
    half, vectors, at = given_half
    assert torch.equal(through(half, vectors, at), vectors)


@given(halves(affine("full"), dtypes=(torch.float64,)))
def test_what_was_decoded_is_held_exactly(given_half):
    half, vectors, at = given_half
    if half.joint:
        return  # the mean of what was decoded is another one
    once = through(half, vectors, at)
    assert_close(through(half, once, at), once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "kinds",
    [
        [Kivi(bits, group=GROUP, residual=GROUP) for bits in (2, 4, 8)],
        [Tada(bits) for bits in (2, 4, 8)],
        [Rotation(bits) for bits in (1, 2, 3, 4)],
    ],
    ids=lambda kinds: kinds[0].name,
)
@given(random=generators)
def test_more_bits_are_closer(kinds, random):
    vectors = torch.randn(2, 4, 2 * GROUP, 32, generator=random)
    at = torch.arange(vectors.shape[2]).expand(vectors.shape[:3])
    for name in ("keys", "values"):
        formats = [getattr(one.formats(Site(Geometry((0,), 4, 4, 32), torch.float32)), name) for one in kinds]
        errors = [(through(half, vectors, at) - vectors).square().mean().item() for half in formats]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < errors[0] / 10


@given(halves(), st.randoms(use_true_random=False))
def test_rows_and_heads_may_come_in_any_order(given_half, shuffle):
    half, vectors, at = given_half
    rows, heads = (shuffle.sample(range(size), size) for size in vectors.shape[:2])
    decoded = through(half, vectors, at)
    atol = 4 * torch.finfo(vectors.dtype).eps * float(decoded.abs().max()) if vectors.numel() else 0.0
    assert_close(through(half, vectors[rows], at), decoded[rows], rtol=0, atol=atol)
    if not half.joint:  # a sum over the heads is rounded by their order
        assert_close(through(half, vectors[:, heads], at), decoded[:, heads], rtol=0, atol=atol)


@given(halves(contents=tuple(EXTREME), least=1))
def test_what_is_decoded_is_finite(given_half):
    half, vectors, at = given_half
    before = vectors.clone()
    decoded = through(half, vectors, at)
    assert decoded.isfinite().all()
    assert decoded.dtype == vectors.dtype
    assert decoded.shape == vectors.shape
    assert torch.equal(vectors, before)


@given(halves(contents=("zero",)))
def test_zero_stays_zero(given_half):
    half, vectors, at = given_half
    assert not through(half, vectors, at).any()


@given(halves(least=1), st.integers(0, 300))
def test_bytes_are_those_of_the_tensors(given_half, capacity):
    half, vectors, at = given_half
    geometry = Geometry((0,), vectors.shape[1], vectors.shape[1], vectors.shape[-1])
    units = vectors.shape[2] // half.unit
    held = sum(column.nbytes for column in half.encode(vectors, at).values())
    assert held == units * vectors.shape[0] * unit_bytes(half, geometry)
    packed = half.sealed(capacity) // half.unit * unit_bytes(half, geometry) / geometry.kv_heads
    tail = half.tail(capacity) * geometry.head_dim * vectors.dtype.itemsize
    assert math.isclose(half.nbytes(capacity, geometry, vectors.dtype), packed + tail)


def unit_bytes(half, geometry):
    """Bytes of one unit of all KV heads."""
    one = sum(column.bytes_per_slot for column in half.columns.values())
    return one if half.joint else one * geometry.kv_heads


@given(BITS, BITS, st.sampled_from((8, 16)), st.integers(1, 4), st.integers(0, 500), st.integers(1, 8))
def test_bytes_of_kivi_are_the_closed_form(key_bits, value_bits, group, steps, length, heads):
    dim, residual = 32, group * steps
    geometry = Geometry((0,), heads, heads, dim)
    formats = Kivi(key_bits, value_bits, group, residual).formats(Site(geometry, torch.bfloat16))
    keys, values = formats.keys.sealed(length), formats.values.sealed(length)
    assert keys == length - length % residual
    assert values == max(0, length - residual)
    tails = [half.tail(length) for half in (formats.keys, formats.values)]
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
    assert half.sealed(length) == packed
    share = bits / 16 + 1 / heads + 2 / (group or dim)
    found = half.nbytes(length, geometry, torch.bfloat16) - 2 * dim * half.tail(length)
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


@given(generators, st.sampled_from(FLOATS), st.floats(-6, 6))
def test_fp8_is_within_a_sixteenth_of_each_number(random, dtype, power):
    half = Fp8().formats(Site(Geometry((0,), 1, 1, 32), dtype)).keys
    vectors = (torch.randn(1, 1, 6, 32, generator=random) * 2**power).to(dtype)
    error = (through(half, vectors, torch.arange(6).expand(1, 1, 6)).double() - vectors.double()).abs()
    peak = vectors.double().abs().amax(-1, keepdim=True)
    # Half a place of 3 bits; below the smallest normal number of e4m3, half a place of that.
    allowed = vectors.double().abs() / 16 + peak / 448 * 2**-10 + peak * 1e-3 + 4 * torch.finfo(dtype).eps * peak
    assert (error <= allowed).all()
