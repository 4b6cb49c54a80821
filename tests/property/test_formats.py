"""What holds for the quantised stores whatever they are given."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvpolicy.stages import Geometry, Site
from kvpolicy_plugins.codecs.kivi import Kivi
from kvpolicy_plugins.codecs.rotation import Rotation
from kvpolicy_plugins.codecs.tada import Tada
from tests.property.formats import EXTREME, GROUP, codecs, fitted, kv_formats, through
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
        errors = [(through(kv_format, vectors, at) - vectors).square().mean().item() for kv_format in formats]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < errors[0] / 10


@given(kv_formats(), st.randoms(use_true_random=False))
def test_rows_may_come_in_any_order_and_heads_one_by_one(given_format, shuffle):
    kv_format, vectors, at = given_format
    rows = shuffle.sample(range(vectors.shape[0]), vectors.shape[0])
    decoded = through(kv_format, vectors, at)
    atol = 4 * torch.finfo(vectors.dtype).eps * float(decoded.abs().max()) if vectors.numel() else 0.0
    assert_close(through(kv_format, vectors[rows], at), decoded[rows], rtol=0, atol=atol)
    if not kv_format.joint:
        for head in range(vectors.shape[1]):
            own = slice(head, head + 1)
            alone = through(kv_format.of_head(head), vectors[:, own], at[:, own])
            assert_close(alone, decoded[:, own], rtol=0, atol=atol)


@given(kv_formats(st.one_of(codecs, fitted), contents=tuple(EXTREME), least=1))
def test_what_is_decoded_is_finite(given_format):
    kv_format, vectors, at = given_format
    before = vectors.clone()
    decoded = through(kv_format, vectors, at)
    assert decoded.isfinite().all()
    assert decoded.dtype == vectors.dtype
    assert decoded.shape == vectors.shape
    assert torch.equal(vectors, before)


@given(kv_formats(contents=("zero",)))
def test_zero_stays_zero(given_format):
    kv_format, vectors, at = given_format
    assume(getattr(kv_format, "means", None) is None)  # zero is not on the grid around a mean
    assert not through(kv_format, vectors, at).any()


@given(kv_formats(st.one_of(codecs, fitted), least=1), st.integers(0, 300))
def test_bytes_are_those_of_the_tensors(given_format, capacity):
    kv_format, vectors, at = given_format
    geometry = Geometry((0,), vectors.shape[1], vectors.shape[1], vectors.shape[-1])
    groups = vectors.shape[2] // kv_format.group_size
    held = sum(column.nbytes for column in kv_format.encode(vectors, at).values())
    assert held == groups * vectors.shape[0] * group_bytes(kv_format, geometry)
    num_groups = kv_format.packed_length(capacity) // kv_format.group_size
    packed = num_groups * group_bytes(kv_format, geometry) / geometry.kv_heads
    residual = kv_format.residual_capacity(capacity) * geometry.head_dim * vectors.dtype.itemsize
    assert math.isclose(kv_format.nbytes(capacity, geometry, vectors.dtype), packed + residual)


def group_bytes(kv_format, geometry):
    """Bytes of one group of all KV heads."""
    one = sum(column.bytes_per_slot for column in kv_format.columns.values())
    return one if kv_format.joint else one * geometry.kv_heads
