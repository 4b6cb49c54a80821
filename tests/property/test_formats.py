"""What holds for the quantised stores whatever they are given."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvpolicy.stages import Geometry, Site
from kvpolicy_plugins.codecs.kivi import Kivi
from kvpolicy_plugins.codecs.rotation import Rotation
from kvpolicy_plugins.codecs.tada import Tada
from tests.property.formats import EXTREME, GROUP, halves, through
from tests.property.layers import generators


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
    units = vectors.shape[2] // half.group_size
    held = sum(column.nbytes for column in half.encode(vectors, at).values())
    assert held == units * vectors.shape[0] * unit_bytes(half, geometry)
    packed = half.packed_length(capacity) // half.group_size * unit_bytes(half, geometry) / geometry.kv_heads
    tail = half.residual_capacity(capacity) * geometry.head_dim * vectors.dtype.itemsize
    assert math.isclose(half.nbytes(capacity, geometry, vectors.dtype), packed + tail)


def unit_bytes(half, geometry):
    """Bytes of one unit of all KV heads."""
    one = sum(column.bytes_per_slot for column in half.columns.values())
    return one if half.joint else one * geometry.kv_heads
