"""What holds for keys in the metric of queries, whatever they are."""

import attrs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from kvpolicy.stages import Geometry, Site
from kvpolicy_plugins.codecs.nova_vq import NovaVQ
from kvpolicy_plugins.codecs.shared.calibrated.query_statistics import stratified
from kvpolicy_plugins.codecs.shared.calibrated.query_weighted_keys import fitted_centroids
from kvpolicy_plugins.codecs.shared.calibrated.vector_quantisation import nearest
from tests.property.formats import through
from tests.property.layers import generators
from tests.support.examples import examples
from tests.support.latents import rotary_of, sample_of, samples

codecs = st.builds(
    NovaVQ,
    st.integers(1, 2),
    st.integers(1, 4),
    centroids=st.sampled_from(("float8", "full")),
    sinks=st.sampled_from((0, 1, 4)),
    value_rotation=st.just(False),
    scales=st.just("full"),
)


def form_of(codec, sample):
    (calibration,) = codec.calibrate([sample])
    site = Site(sample.geometry, torch.float64, calibration=calibration)
    codec.check_calibration(site)
    return codec.formats(site).keys


def means_of(form, positions):
    return form.means.tensor[:, positions.clamp(max=form.means.tensor.shape[1] - 1)][None]


@given(samples(), codecs)
def test_what_is_taken_to_the_basis_comes_back(sample, codec):
    form = form_of(codec, sample)
    scale = float(sample.keys.abs().max())
    assert_close(form.from_basis(form.to_basis(sample.keys)), sample.keys, atol=1e-9 * scale, rtol=0)
    group = sample.geometry.query_heads // sample.geometry.kv_heads
    products = sample.queries[:, ::group] @ sample.keys.mT
    found = form.queries_to_basis(sample.queries[:, ::group]) @ form.to_basis(sample.keys).mT
    assert_close(found, products, atol=1e-9 * float(products.abs().max()), rtol=0)


@given(samples(), codecs, generators)
def test_a_norm_in_the_basis_is_the_error_that_queries_see(sample, codec, random):
    """At least that: directions in which there are no queries count for a millionth of the most."""
    form, heads = form_of(codec, sample), sample.geometry.kv_heads
    error = torch.randn(1, heads, 1, sample.geometry.head_dim, generator=random, dtype=torch.float64)
    products = sample.queries.unflatten(1, (heads, -1)) @ error[:, :, None].mT
    expected = products.square().sum(2).mean((0, 2)).flatten()
    most = form.basis.forward.tensor.square().sum((1, 2)) * error.square().sum((0, 2, 3))
    norms = form.to_basis(error).square().sum(-1).flatten()
    assert (norms >= expected * (1 - 1e-9)).all()
    assert (norms <= expected * (1 + 1e-9) + 2e-6 * most).all()


@given(samples(), codecs, st.floats(-8, 8), st.integers(0, 8))
def test_a_key_farther_from_the_mean_is_decoded_farther(sample, codec, power, first):
    form, keys = form_of(codec, sample), sample.keys[:, :, :6]
    positions = torch.arange(first, first + keys.shape[2])
    at, means = positions.expand(keys.shape[:3]), means_of(form, positions)
    near = form.decode(form.encode(keys, at), at)
    far = form.decode(form.encode(means + (keys - means) * 2.0**power, at), at)
    # Codes near a tie may differ, for the same error.
    reached = (far - means) / 2.0**power
    errors = [form.to_basis(one - (keys - means)).norm(dim=-1) for one in (reached, near - means)]
    assert_close(*errors, atol=1e-6 * float(form.to_basis(keys - means).norm(dim=-1).max()), rtol=1e-6)
    assert_close(form.decode(form.encode(means.expand_as(keys), at), at), means.expand_as(keys))


@settings(max_examples=examples(10))
@given(generators, st.integers(1, 2))
def test_errors_of_logits_are_no_larger_than_in_an_orthonormal_basis(random, heads):
    """The same quantisation of the same keys in the basis of their principal components."""
    geometry = Geometry((0,), 2 * heads, heads, 8)
    sample = sample_of(random, geometry, rotary_of(8), 2, 500)
    sizes = 0.5 ** torch.arange(8).double()[torch.randperm(8, generator=random)]
    sample = attrs.evolve(sample, queries=sample.queries * sizes)
    codec = NovaVQ(centroids="full", scales="full", sinks=0)
    decoded = through(form_of(codec, sample), sample.keys, torch.arange(500).expand(sample.keys.shape[:3]))
    errors = [logit_error(sample, keys) for keys in (decoded, in_principal_components(sample))]
    assert errors[0] < errors[1]


def in_principal_components(sample):
    keys = sample.keys.movedim(1, 0).flatten(1, 2)
    mean = keys.mean(1, keepdim=True)
    _, basis = torch.linalg.eigh((keys - mean).mT @ (keys - mean))
    basis = basis.flip(-1)[..., stratified(8, 4)]
    coordinates = (keys - mean) @ basis
    scale = coordinates.square().mean(-1, keepdim=True).sqrt()
    books = fitted_centroids(coordinates / scale, 2, 4, 0)
    points = (coordinates / scale).unflatten(-1, (2, 4)).movedim(2, 1)
    codes = nearest(points.flatten(0, 1), books.flatten(0, 1)).view(*points.shape[:3])
    found = books.gather(2, codes[..., None].expand(-1, -1, -1, 4)).movedim(1, 2).flatten(2)
    return (scale * found @ basis.mT + mean).unflatten(1, (2, -1)).movedim(0, 1)


def logit_error(sample, keys):
    group = sample.geometry.query_heads // sample.geometry.kv_heads
    return float((sample.queries @ (keys - sample.keys).repeat_interleave(group, 1).mT).square().mean())
