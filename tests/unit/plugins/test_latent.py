"""The store `latent`: what it refuses, and how exact it is in each dtype."""

import attrs
import pytest
import torch
from torch.testing import assert_close

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Geometry, Site
from kvpolicy.stages.conformance import Promises, conformance_cases
from kvpolicy_plugins.codecs.latent import Latent
from tests.support.latents import formats_of, rotary_of, sample_of

GEOMETRY = Geometry((0, 1), 4, 2, 8)
CONFORMANCE = (
    *conformance_cases(Latent(1.0, 8), Promises(error=0.02)),
    *conformance_cases(Latent(0.9, 4, 16, "full", 3), Promises(error=0.7)),
    *conformance_cases(Latent(), Promises(error=1.5)),
)


@pytest.fixture
def sample():
    return sample_of(torch.Generator().manual_seed(0), GEOMETRY, rotary_of(8, dtype=torch.float32))


def site_of(sample, codec, dtype=torch.float32, **changes):
    (calibration,) = codec.calibrate([sample])
    return attrs.evolve(Site(GEOMETRY, dtype, 1, sample.rotary, calibration), **changes)


def places_of(keys):
    return torch.arange(keys.shape[2]).expand(keys.shape[:3])


def test_one_direction_needs_a_latent_of_one_number():
    """All tokens of both heads along (3, 0 | 0, -4), not rotated: a latent is the length along (0.6, 0 | 0, -0.8)."""
    geometry, rotary = Geometry((0,), 2, 2, 2), rotary_of(2, share=1.0)
    sample = sample_of(torch.Generator().manual_seed(0), geometry, rotary, 1, 5)
    lengths = torch.tensor([2.0, -1.0, 5.0, 0.0, 1.0]).double()
    plain = torch.tensor([[3.0, 0.0], [0.0, -4.0]]).double()[None, :, None] * lengths[:, None]
    keys = rotary.rotate(plain, torch.arange(5))
    codec = Latent(0.25, value_group=2)
    (calibration,) = codec.calibrate([attrs.evolve(sample, keys=keys)])
    form = codec.formats(Site(geometry, torch.float64, 0, rotary, calibration)).keys
    assert_close(calibration["basis"][:, 0], torch.tensor([-0.6, 0.0, 0.0, 0.8]).double())
    assert_close(calibration["energy"], torch.tensor(1.0).double())
    columns = form.encode(keys, places_of(keys))
    assert_close(columns["latent"], -5 * lengths[None, None, :, None])
    assert_close(form.decode(columns, places_of(keys)), keys)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_full_rank_costs_what_the_dtype_costs(sample, dtype, error):
    codec = Latent(1.0, value_group=4, value_bits=8)
    formats = codec.formats(site_of(sample, codec, dtype))
    for form, vectors in ((formats.keys, sample.keys.to(dtype)), (formats.values, sample.values.to(dtype))):
        columns = form.encode(vectors, places_of(vectors))
        assert {name: (one.dtype, one.shape[3:]) for name, one in columns.items()} == {
            name: (column.dtype, column.shape) for name, column in form.columns.items()
        }
        decoded = form.decode(columns, places_of(vectors))
        assert decoded.dtype == dtype
        allowed = error if form is formats.keys else error + 1 / 255
        worst = (decoded.float() - vectors.float()).abs().amax() / vectors.float().abs().amax()
        assert worst <= allowed


def test_far_from_the_start_rotation_is_undone_as_well(sample):
    form = formats_of(sample, 1.0, dtype=torch.float32).keys
    keys = sample.keys.float()
    places = places_of(keys) + 1_000_000
    assert_close(form.decode(form.encode(keys, places), places), keys, atol=1e-3, rtol=1e-4)


def test_half_precision_is_computed_in_float32(sample):
    """A latent of bfloat16 keys is that of the same numbers in float32, rounded once."""
    narrow, wide = (formats_of(sample, 0.5, dtype=dtype).keys for dtype in (torch.bfloat16, torch.float32))
    keys = sample.keys.bfloat16()
    found = narrow.encode(keys, places_of(keys))["latent"]
    assert torch.equal(found, wide.encode(keys.float(), places_of(keys))["latent"].bfloat16())


def test_numbers_that_float16_cannot_hold_become_the_largest_that_it_can(sample):
    form = formats_of(sample, 1.0, dtype=torch.float16).keys
    keys = torch.full((1, 2, 3, 8), 6e4, dtype=torch.float16)
    latents = form.encode(keys, places_of(keys))
    assert latents["latent"].abs().amax() == torch.finfo(torch.float16).max
    assert form.decode(latents, places_of(keys)).isfinite().all()


def test_calibration_is_at_least_float32_and_one_of_a_wider_rank_will_do(sample):
    halves = attrs.evolve(sample, keys=sample.keys.bfloat16())
    assert Latent().calibrate([halves])[0]["basis"].dtype == torch.float32
    assert Latent().calibrate([sample])[0]["basis"].dtype == torch.float64
    narrow, wide = Latent(0.25, value_group=8), Latent(0.75, value_group=8)
    found = narrow.formats(site_of(sample, wide)).keys
    assert torch.equal(found.basis, narrow.formats(site_of(sample, narrow)).keys.basis)
    assert found.columns["latent"].shape == (4,)


def test_each_layer_has_its_own_basis(sample):
    other = sample_of(torch.Generator().manual_seed(7), GEOMETRY, sample.rotary)
    first, second = Latent().calibrate([sample, other])
    assert not torch.equal(first["basis"], second["basis"])
    assert torch.equal(second["basis"], Latent().calibrate([other])[0]["basis"])
    assert Latent().calibrate([]) == []


def test_the_newest_stay_exact(sample):
    codec = Latent(0.25, value_group=4, residual=5, batch=1)
    formats = codec.formats(site_of(sample, codec))
    assert codec.joint
    assert codec.calibrated
    assert formats.keys.joint
    assert not formats.values.joint
    for form in (formats.keys, formats.values):
        assert (form.residual_length, form.step, form.group_size) == (5, 1, 1)
        assert [form.packed_length(length) for length in (0, 4, 5, 6, 40)] == [0, 0, 0, 1, 35]


def test_nothing_is_encoded_to_nothing(sample):
    form = formats_of(sample).keys
    none = torch.zeros(2, 2, 0, 8, dtype=torch.float64)
    columns = form.encode(none, places_of(none))
    assert columns["latent"].shape == (2, 1, 0, 8)
    assert form.decode(columns, places_of(none)).shape == none.shape


def test_what_does_not_go_with_the_model_is_refused(sample):
    codec = Latent(0.5, value_group=4)
    good = site_of(sample, codec)
    lost = {"basis": good.calibration["basis"][:, :3]}
    cases = {
        r"value_group: must divide the head dimension 8 of this model: 3": (Latent(value_group=3), good),
        r"needs the rotary embedding of the model": (codec, attrs.evolve(good, rotary=None)),
        r"rank: must come with a calibration of layer 1": (codec, attrs.evolve(good, calibration={})),
        r"a basis of shape \[16, 8\] or wider for this model: \[16, 3\]": (codec, attrs.evolve(good, calibration=lost)),
        r"\[32, 16\] or wider for this model: \[16, 8\]": (
            codec,
            attrs.evolve(good, geometry=Geometry((0, 1), 4, 4, 8)),
        ),
    }
    for message, (one, site) in cases.items():
        with pytest.raises(ParameterError, match=message):
            one.formats(site)
    with pytest.raises(ParameterError, match="needs the rotary embedding of the model"):
        codec.calibrate([attrs.evolve(sample, rotary=None)])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rank": 0}, "rank: must be a number above 0, up to 1: 0"),
        ({"rank": 1.5}, "rank: must be"),
        ({"value_bits": 3}, "value_bits: must be one of 2, 4, 8: 3"),
        ({"residual": -1}, "residual: must be an integer from 0 to 1000000000: -1"),
        ({"scales": "double"}, "scales: must be one of half, full"),
    ],
)
def test_parameters_keep_their_rules(parameters, message):
    with pytest.raises(ParameterError, match=message):
        Latent(**parameters)


@pytest.mark.parametrize("check", [check for _, check in CONFORMANCE])
def test_contract(check):
    check()
