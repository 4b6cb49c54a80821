"""Keys rotated into one codebook, or in float8; values between minimum and maximum."""

import math

import pytest
import torch

from kvpolicy.errors import ParameterError
from kvpolicy.stages import AsIs, Geometry, Site
from kvpolicy.stages.conformance import Promises, conformance_cases
from kvpolicy_plugins.codecs.rotation import Rotation
from kvpolicy_plugins.codecs.shared.packing import unpack
from kvpolicy_plugins.codecs.turboquant import TurboQuant

CASES = [
    pytest.param(check, id=f"{codec.key_bits}/{codec.value_bits} bits, {codec.signs} signs: {name}")
    for codec, error in (
        (TurboQuant(1, 2, residual=3), 1.0),
        (TurboQuant(2, 3, norm_correction=False), 0.6),
        (TurboQuant(3, 4, signs="none", scales="full"), 0.4),
        (TurboQuant(8, 3), 0.15),
    )
    for name, check in conformance_cases(codec, Promises(error=error))
]


@pytest.mark.parametrize("check", CASES)
def test_contract(check):
    check()


def forms(dim, dtype=torch.float32, layers=1, layer=0, **parameters):
    geometry = Geometry(tuple(range(layers)), 1, 1, dim)
    formats = TurboQuant(**parameters).formats(Site(geometry, dtype, layer))
    return formats.keys, formats.values


def through(kv_format, vectors):
    """Of vectors [n, D]."""
    return kv_format.decode(kv_format.encode(vectors[None, None], None), None)[0, 0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_zero_key_stays_zero(bits):
    keys, _ = forms(8, key_bits=bits)
    assert torch.equal(through(keys, torch.zeros(2, 8)), torch.zeros(2, 8))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_equal_values_are_reproduced(bits):
    _, values = forms(8, value_bits=bits)
    vectors = torch.tensor([0.0, -1.5, 1000.0, 3e-5]).half().float()[:, None].expand(4, 8)
    assert torch.equal(through(values, vectors), vectors)


def test_values_are_rounded_half_up():
    _, values = forms(8, value_bits=2)
    columns = values.encode(torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 2.49, 3])[None, None, None], None)
    assert unpack(columns["codes"], 2, 8).flatten().tolist() == [0, 1, 1, 2, 2, 3, 2, 3]
    assert (columns["scale"].item(), columns["minimum"].item()) == (1, 0)


def test_the_codes_of_values_follow_from_scales_before_they_are_rounded():
    _, values = forms(2, value_bits=2, dtype=torch.float64)
    low, high = 1 + 2**-12, 4.0  # float16 has 1 and no number between it and 1 + 2**-10
    columns = values.encode(torch.tensor([low, high], dtype=torch.float64)[None, None, None], None)
    assert columns["minimum"].item() == 1
    assert unpack(columns["codes"], 2, 2).flatten().tolist() == [0, 3]
    middle = low + (high - low) / 2 - 1e-5  # nearer to code 1 from `low`, nearer to code 2 from 1
    columns = values.encode(torch.tensor([low, high, middle], dtype=torch.float64)[None, None, None], None)
    assert unpack(columns["codes"], 2, 3).flatten().tolist() == [0, 3, 1]


def test_a_key_on_an_edge_has_the_upper_code():
    keys, _ = forms(4, key_bits=2, signs="none", norm_correction=False)
    columns = keys.encode(torch.full((1, 1, 1, 4), 3.0), None)
    assert unpack(columns["codes"], 2, 4).flatten().tolist() == [3, 2, 2, 2]  # rotated: 2, 0, 0, 0
    assert columns["norm"].item() == 6


def test_norms_are_corrected_or_not():
    keys = torch.randn(40, 64, generator=torch.Generator().manual_seed(5))
    norms = keys.norm(dim=-1)
    corrected, plain = (through(forms(64, key_bits=2, norm_correction=how)[0], keys) for how in (True, False))
    torch.testing.assert_close(corrected.norm(dim=-1), norms, rtol=2**-10, atol=0)
    assert ((plain.norm(dim=-1) / norms - 1).abs() > 2**-10).float().mean() > 0.9
    directions = [torch.nn.functional.normalize(decoded, dim=-1) for decoded in (corrected, plain)]
    torch.testing.assert_close(*directions, rtol=0, atol=1e-5)


def test_without_norm_correction_keys_are_those_of_the_rotation():
    keys = torch.randn(40, 64, generator=torch.Generator().manual_seed(6))
    rotation = Rotation(3, seed=7).formats(Site(Geometry((0,), 1, 1, 64), torch.float32)).keys
    found, _ = forms(64, key_bits=3, norm_correction=False, seed=7)
    assert torch.equal(through(found, keys), through(rotation, keys))


def test_keys_with_a_common_mean_need_signs():
    keys = 5 + torch.randn(200, 64, generator=torch.Generator().manual_seed(8))
    seeded, none = ((through(forms(64, signs=signs)[0], keys) - keys).square().mean() for signs in ("seeded", "none"))
    assert 10 * seeded < none


def test_float8_keys_are_not_scaled_and_saturate():
    keys, _ = forms(4, key_bits=8)
    found = through(keys, torch.tensor([[1.0, 1.06, -500.0, 1e6]]))
    assert torch.equal(found, torch.tensor([[1.0, 1.0, -448.0, 448.0]]))


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "nbytes"), [(8, 4, 196), (4, 4, 134), (3, 4, 118), (3, 3, 102), (1, 2, 54)]
)
def test_bytes_of_an_entry(key_bits, value_bits, nbytes):
    kv_formats = forms(128, torch.bfloat16, key_bits=key_bits, value_bits=value_bits)
    assert sum(column.bytes_per_slot for one in kv_formats for column in one.columns.values()) == nbytes


@pytest.mark.parametrize("signs", ["seeded", "none"])
def test_rotated_keys_need_a_power_of_two(signs):
    with pytest.raises(ParameterError, match=r"^turboquant: must have a head dimension that is a power of two: 48$"):
        forms(48, signs=signs)
    keys, values = forms(48, key_bits=8, signs=signs)
    vectors = torch.linspace(-2, 2, 96).view(2, 48)
    assert (through(keys, vectors) - vectors).abs().max() <= 1 / 16
    assert (through(values, vectors) - vectors).abs().max() <= 2 / 15


@pytest.mark.parametrize(
    ("name", "value"),
    [("key_bits", 0), ("key_bits", 5), ("value_bits", 1), ("value_bits", 8), ("signs", "some"), ("norm_correction", 1)],
)
def test_what_there_is_not_is_refused(name, value):
    with pytest.raises(ParameterError, match=f"^{name}: must be .*: '?{value}'?$"):
        TurboQuant(**{name: value})


@pytest.mark.parametrize(
    ("layers", "native"), [(12, [0, 1, 10, 11]), (8, [0, 1, 6, 7]), (7, [0, 6]), (4, [0, 3]), (3, []), (1, [])]
)
def test_layers_at_both_ends_can_stay_native(layers, native):
    found = [forms(8, layers=layers, layer=layer, native_first=2, native_last=2) for layer in range(layers)]
    assert [layer for layer, pair in enumerate(found) if all(isinstance(one, AsIs) for one in pair)] == native
    assert [layer for layer, pair in enumerate(found) if any(isinstance(one, AsIs) for one in pair)] == native


def test_the_newest_entries_stay_as_they_are():
    assert [one.packed_length(20) for one in forms(8, residual=9)] == [0, 0]
    assert [one.packed_length(20) for one in forms(8, key_bits=8, batch=4)] == [20, 20]
    assert forms(64, seed=3)[0].signs != forms(64, seed=4)[0].signs


def test_numbers_beyond_float16_are_clamped():
    keys, values = forms(16)
    largest = torch.finfo(torch.float32).max * torch.tensor([1.0, -1.0]).repeat(8)[None]
    for kv_format in (keys, values):
        assert through(kv_format, largest).isfinite().all()
    error = (through(values, torch.full((1, 16), 1e6)) - 65504).abs().max()
    assert math.isclose(error, 0)
