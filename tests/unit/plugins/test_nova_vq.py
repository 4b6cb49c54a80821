"""The store `nova_vq` against loops over tokens, heads and groups, and what it refuses."""

import math

import attrs
import pytest
import torch
from torch.testing import assert_close

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Geometry, Site
from kvpolicy.stages.conformance import Promises, conformance_cases
from kvpolicy_plugins.codecs.nova_vq import NovaVQ
from kvpolicy_plugins.codecs.shared.packing import unpack
from tests.support.latents import rotary_of, sample_of

GEOMETRY = Geometry((0, 1), 4, 2, 8)
CASES = [
    pytest.param(check, id=f"{codec.bits} bits, groups of {codec.group}: {name}")
    for codec, error in (
        (NovaVQ(4, 2, centroids="full", sinks=0, value_bits=8, value_clip=1, scales="full"), 0.7),
        (NovaVQ(1, 5, normalise=False, residual=3, value_rotation=False, value_bits=3), 1.2),
    )
    for name, check in conformance_cases(codec, Promises(error=error))
]


@pytest.mark.parametrize("check", CASES)
def test_contract(check):
    check()


@pytest.fixture
def sample():
    drawn = sample_of(torch.Generator().manual_seed(0), GEOMETRY, rotary_of(8), tokens=300)
    return attrs.evolve(drawn, values=drawn.values.double())


def exact(**parameters):
    """Nothing is rounded but to codes."""
    return NovaVQ(**{"centroids": "full", "scales": "full", "batch": 1, "residual": 0, **parameters})


def site_of(codec, sample, **changes):
    (calibration,) = codec.calibrate([sample])
    return attrs.evolve(Site(sample.geometry, sample.keys.dtype, 1, calibration=calibration), **changes)


def places_of(vectors):
    return torch.arange(vectors.shape[2]).expand(vectors.shape[:3])


def through(form, vectors):
    return form.decode(form.encode(vectors, places_of(vectors)), places_of(vectors))


def looped(codec, calibration, key, head, position):
    """Codes, scale and decoded key of one key."""
    forward, dim = calibration["forward"][head], len(key)
    mean = calibration["means"][head, min(position, codec.sinks)]
    coordinates = [sum((key[j] - mean[j]) * forward[j, i] for j in range(dim)).item() for i in range(dim)]
    scale = math.sqrt(sum(one**2 for one in coordinates) / dim) if codec.normalise else 1.0
    codes, chosen = [], []
    for group, start in enumerate(range(0, dim, codec.group)):
        own = [one / scale for one in coordinates[start : start + codec.group]]
        book = calibration["centroids"][head, group].tolist()
        errors = [sum((a - b) ** 2 for a, b in zip(own, entry, strict=False)) for entry in book]
        codes.append(errors.index(min(errors)))
        chosen += book[codes[-1]][: len(own)]
    return codes, scale, scale * torch.tensor(chosen, dtype=torch.float64) @ torch.linalg.inv(forward) + mean


@pytest.mark.parametrize(
    "codec", [exact(), exact(bits=1, group=3), exact(normalise=False, sinks=0), exact(bits=4, group=1)]
)
def test_keys_are_those_of_a_loop(codec, sample):
    site = site_of(codec, sample)
    form, keys = (
        codec.formats(site).keys,
        sample_of(torch.Generator().manual_seed(1), GEOMETRY, rotary_of(8), 1, 12).keys,
    )
    columns = form.encode(keys, places_of(keys))
    codes = unpack(columns["codes"], codec.bits * codec.group, -(-8 // codec.group))
    decoded = form.decode(columns, places_of(keys))
    for head in range(2):
        for token in range(12):
            own, scale, expected = looped(codec, site.calibration, keys[0, head, token], head, token)
            assert codes[0, head, token].tolist() == own
            assert not codec.normalise or math.isclose(columns["scale"][0, head, token].item(), scale, rel_tol=1e-12)
            assert_close(decoded[0, head, token], expected, atol=1e-10, rtol=1e-10)


def test_the_basis_weighs_errors_by_queries(sample):
    """|x F|² is the mean over tokens of the squared products with x, summed over the queries of the head."""
    (calibration,) = exact().calibrate([sample])
    vectors = torch.randn(2, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for head in range(2):
        products = sample.queries[:, 2 * head : 2 * head + 2] @ vectors[head]
        expected = products.square().sum(1).mean()
        assert_close((vectors[head] @ calibration["forward"][head]).square().sum(), expected)
        keys = sample.keys[:, head] - calibration["means"][head][torch.arange(300).clamp(max=4)]
        coordinates = keys.flatten(0, 1) @ calibration["forward"][head]
        variances = coordinates.T @ coordinates / len(coordinates)
        assert_close(variances, variances.diagonal().diag(), atol=1e-9 * float(variances.max()), rtol=0)
        ranks = variances.diagonal().argsort(descending=True)
        assert ranks.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]  # rank i is in group i mod 2


def test_keys_of_a_sink_have_a_mean_of_their_own(sample):
    """The same key in all texts is decoded exactly, however far from all others, and moves no other mean."""
    keys = sample.keys.clone()
    keys[:, :, 0] = 100 * torch.arange(8)
    with_sink, codec = attrs.evolve(sample, keys=keys), exact(sinks=1)
    form = codec.formats(site_of(codec, with_sink)).keys
    assert_close(through(form, keys)[:, :, 0], keys[:, :, 0])
    assert_close(codec.calibrate([with_sink])[0]["means"][:, 1], sample.keys[:, :, 1:].mean((0, 2)))
    none = exact(sinks=0)
    other = none.formats(site_of(none, with_sink)).keys
    assert (through(other, keys) - keys)[:, :, 0].abs().max() > 1


def test_the_mean_is_decoded_exactly(sample):
    for codec in (exact(), NovaVQ()):
        form = codec.formats(site_of(codec, sample)).keys
        means = form.means.tensor[None].to(sample.keys.dtype)
        assert torch.equal(through(form, means), means)


def test_codes_follow_from_the_scale_that_is_stored(sample):
    """A key is decoded by it, and near the least float16 it is off by some percent."""
    quiet = attrs.evolve(sample, queries=sample.queries * 2**-21)
    halves = NovaVQ(centroids="full")
    site = site_of(halves, quiet)
    form, keys = halves.formats(site).keys, sample.keys
    columns = form.encode(keys, places_of(keys))
    assert columns["scale"].dtype == torch.float16
    coordinates = form.to_basis(keys - form.means.tensor[:, places_of(keys)[0, 0].clamp(max=4)])
    relative = coordinates / columns["scale"].double()[..., None]
    books = site.calibration["centroids"]
    distances = (relative.unflatten(-1, (2, 4))[:, :, :, :, None] - books[:, None]).square().sum(-1)
    assert torch.equal(unpack(columns["codes"], 8, 2).long(), distances.argmin(-1))


@pytest.mark.parametrize("scales", ["half", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_largest_keys_and_values_are_decoded_to_finite_numbers(dtype, scales, sample):
    formats = (codec := NovaVQ(scales=scales)).formats(site_of(codec, sample, dtype=dtype))
    signs = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(4)).sign().to(dtype)
    for form in (formats.keys, formats.values):
        assert through(form, signs * torch.finfo(dtype).max).isfinite().all()


def test_products_with_queries_hold_beside_entries_that_are_not_packed(sample):
    """What is decoded in the basis contains the mean: it does not cancel where other entries have none."""
    codec = exact()
    form, keys, queries = codec.formats(site_of(codec, sample)).keys, sample.keys, sample.queries[:, ::2]
    columns = form.encode(keys, places_of(keys))
    there = torch.cat([form.decode_in_basis(columns, places_of(keys), torch.float64), form.to_basis(keys)], 2)
    expected = queries @ torch.cat([form.decode(columns, places_of(keys)), keys], 2).mT
    assert_close(form.queries_to_basis(queries) @ there.mT, expected, atol=1e-9, rtol=1e-9)


def test_centroids_have_two_bits_of_mantissa(sample):
    codec = NovaVQ()
    site = site_of(codec, sample)
    given, rounded = site.calibration["centroids"], codec.formats(site).keys.centroids.tensor
    assert ((rounded - given).abs() <= given.abs() / 8 + 1e-9).all()
    assert not torch.equal(rounded, given)
    largest = given.abs().amax((-1, -2), keepdim=True)
    assert_close(rounded.abs().amax((-1, -2), keepdim=True), largest)
    mantissas = (rounded / largest * 1.75).abs()  # the largest float8 is 1.75 times a power of two
    steps = mantissas / 2 ** mantissas.clamp(min=1e-6).log2().add(1e-9).floor() * 4
    assert_close(steps, steps.round(), atol=1e-6, rtol=0)


def test_values_are_those_of_a_loop(sample):
    codec = exact(value_bits=2, value_clip=0.7)
    site, values = site_of(codec, sample), sample.values[:1, :, :6]
    form, rotation = codec.formats(site).values, site.calibration["rotation"]
    decoded = through(form, values)
    for head in range(2):
        for token in range(6):
            rotated = (values[0, head, token] @ rotation).tolist()
            limit = sorted(map(abs, rotated))[5]  # of 8, 0.7 · 8 = 5.6
            clipped = [max(-limit, min(limit, one)) for one in rotated]
            scale = (max(clipped) - min(clipped)) / 3
            codes = [math.floor((one - min(clipped)) / scale + 0.5) for one in clipped]
            expected = torch.tensor([min(clipped) + code * scale for code in codes]).double() @ torch.linalg.inv(
                rotation
            )
            assert_close(decoded[0, head, token], expected, atol=1e-6, rtol=1e-6)


def test_the_rotation_spreads_what_attention_reads(sample):
    """Orthonormal, and after it every channel has the same variance, weighted by k' Sq k."""
    (calibration,) = exact().calibrate([sample])
    rotation = calibration["rotation"]
    assert_close(rotation.T @ rotation, torch.eye(8).double())
    moments = torch.zeros(8, 8, dtype=torch.float64)
    for head in range(2):
        keys, values = (states[:, head].flatten(0, 1) for states in (sample.keys, sample.values.double()))
        queries = sample.queries[:, 2 * head : 2 * head + 2].flatten(0, 2)
        weights = (keys @ queries.T).square().mean(1)
        moments += values.T @ (values * (weights / weights.mean())[:, None]) / len(keys) / 2
    after = rotation.T @ moments @ rotation
    assert_close(after.diagonal(), torch.full((8,), moments.trace().item() / 8).double())
    assert (moments.diagonal() - moments.trace() / 8).abs().max() > 1e-3


def test_fewer_queries_than_dimensions_leave_an_inverse(sample):
    few = attrs.evolve(
        sample, queries=sample.queries[:1, :, :1], keys=sample.keys[:1, :, :1], values=sample.values[:1, :, :1]
    )
    codec = exact()
    site = site_of(codec, few)
    codec.check_calibration(site)
    sizes = torch.linalg.svdvals(site.calibration["forward"])
    assert_close(sizes[:, -1] / sizes[:, 0], torch.full((2,), 1e-3).double())
    assert_close(through(codec.formats(site).keys, few.keys), few.keys)
    none = attrs.evolve(few, queries=torch.zeros_like(few.queries))
    assert_close(torch.linalg.svdvals(codec.calibrate([none])[0]["forward"]), torch.ones(2, 8).double())


def test_with_no_more_tokens_than_centroids_every_token_is_one(sample):
    """All are decoded exactly; positions that no text has get the mean of all others."""
    few = attrs.evolve(sample, **{name: getattr(sample, name)[:1, :, :30] for name in ("queries", "keys", "values")})
    codec = exact(sinks=40)
    site = site_of(codec, few)
    assert_close(site.calibration["means"][:, 30:], few.keys.mean((0, 2))[:, None].expand(2, 11, 8))
    codec = exact(sinks=0)
    assert_close(through(codec.formats(site_of(codec, few)).keys, few.keys), few.keys)


def test_calibration_is_at_least_float32_and_each_layer_by_itself(sample):
    halves = attrs.evolve(sample, **{name: getattr(sample, name).bfloat16() for name in ("queries", "keys", "values")})
    first, second = NovaVQ().calibrate([halves, sample])
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}
    alone = NovaVQ().calibrate([sample])[0]
    assert {tensor.dtype for tensor in second.values()} == {torch.float64}
    assert all(torch.equal(second[name], alone[name]) for name in alone)
    assert not torch.equal(NovaVQ(seed=1).calibrate([sample])[0]["centroids"], alone["centroids"])


def test_bytes_of_an_entry():
    """2 bits a number, and scales of 16 bits: one for a key, two for a value."""
    zeros = {"forward": torch.eye(128).expand(2, -1, -1), "means": torch.zeros(2, 5, 128)}
    zeros |= {"centroids": torch.zeros(2, 32, 256, 4), "rotation": torch.eye(128)}
    formats = NovaVQ().formats(Site(Geometry((0,), 4, 2, 128), torch.bfloat16, calibration=zeros))
    assert [
        sum(column.bytes_per_slot for column in form.columns.values()) for form in (formats.keys, formats.values)
    ] == [
        34,
        36,
    ]
    assert formats.keys.unpacking() == "has no tile function"


def test_codes_of_fewer_bits_share_bytes():
    site = Site(Geometry((0,), 1, 1, 8), torch.float32)
    codec = NovaVQ(1, 3)
    zeros = {"forward": torch.eye(8)[None], "means": torch.zeros(1, 5, 8), "centroids": torch.zeros(1, 3, 8, 3)}
    site = attrs.evolve(site, calibration=zeros | {"rotation": torch.eye(8)})
    assert codec.formats(site).keys.columns["codes"].shape == (2,)  # three codes of 3 bits


CHANGES = {
    "missing": ({"means": None}, r"nova_vq: must come with a calibration of layer 1: 'means' is missing"),
    "another model": ({"forward": torch.eye(4).expand(2, -1, -1)}, r"'forward' must be \[2, 8, 8\] .*: \[2, 4, 4\]"),
    "fewer centroids": ({"centroids": torch.zeros(2, 2, 16, 4)}, r"'centroids' must be \[2, 2, 256, 4\] .*16"),
    "whole numbers": (
        {"means": torch.zeros(2, 5, 8, dtype=torch.int64)},
        "'means' must be floating point: torch.int64",
    ),
    "infinity": ({"centroids": torch.full((2, 2, 256, 4), torch.inf)}, "'centroids' must be finite"),
    "zeros": ({"forward": torch.zeros(2, 8, 8)}, "forward must be invertible: .* is above 10000"),
    "one head": ({"forward": torch.stack([torch.eye(8), torch.eye(8).index_fill_(1, torch.tensor([3]), 0)])}, "invert"),
    "nearly singular": ({"forward": torch.diag(torch.tensor([1e5] + 7 * [1.0])).expand(2, -1, -1)}, "invertible"),
    "a rotation": (
        {"rotation": torch.diag(torch.tensor([1.01] + 7 * [1.0]))},
        "rotation must have orthonormal columns",
    ),
}


@pytest.mark.parametrize(("changes", "message"), CHANGES.values(), ids=CHANGES)
def test_a_calibration_is_looked_at(changes, message, sample):
    codec = NovaVQ()
    site = site_of(codec, sample)
    codec.check_calibration(site)
    tensors = {name: tensor for name, tensor in {**site.calibration, **changes}.items() if tensor is not None}
    with pytest.raises(ParameterError, match=message):
        codec.check_calibration(attrs.evolve(site, calibration=tensors))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"bits": 9}, "bits: must be an integer from 1 to 8: 9"),
        ({"group": 5}, "group: must be at most 4, because a centroid has 8 bits: 5"),
        ({"value_bits": 5}, "value_bits: must be one of 2, 3, 4, 8: 5"),
        ({"value_clip": 0}, "value_clip: must be a number above 0, up to 1: 0"),
        ({"centroids": "half"}, "centroids: must be one of float8, full"),
        ({"sinks": 2000}, "sinks: must be an integer from 0 to 1024: 2000"),
    ],
)
def test_parameters_keep_their_rules(parameters, message):
    with pytest.raises(ParameterError, match=message):
        NovaVQ(**parameters)


def test_values_of_other_head_dimensions_are_not_rotated():
    geometry = Geometry((0,), 2, 1, 12)
    sample = sample_of(torch.Generator().manual_seed(0), geometry, rotary_of(12))
    with pytest.raises(ParameterError, match=r"^value_rotation: must be false for a head dimension .* of two: 12$"):
        NovaVQ().calibrate([sample])
    codec = NovaVQ(value_rotation=False, value_bits=8, value_clip=1)
    values = codec.formats(site_of(codec, sample)).values
    assert (through(values, sample.values) - sample.values).abs().max() < sample.values.abs().max() / 100
