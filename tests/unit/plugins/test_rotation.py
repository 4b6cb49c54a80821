"""A random rotation, then one codebook for all."""

import math

import pytest
import torch

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Geometry, Sample, Site
from kvpolicy.stages.conformance import Promises, conformance_cases
from kvpolicy_plugins.codecs.rotation import Rotation
from kvpolicy_plugins.codecs.shared.codebook import codebook, edges_between, nearest_code
from kvpolicy_plugins.codecs.shared.hadamard import _sylvester, hadamard
from kvpolicy_plugins.codecs.shared.packing import unpack
from tests.support.latents import rotary_of

CASES = [
    pytest.param(check, id=f"{codec.bits} bits: {name}")
    for codec, error in (
        (Rotation(1), 1.0),
        (Rotation(2, seed=7), 0.6),
        (Rotation(3, residual=5), 0.4),
        (Rotation(scales="full"), 0.25),
        (Rotation(3, 2, norm_correction=True), 0.6),
        (Rotation(centre="calibrated", norm_correction=True), 0.25),
        (Rotation(3, centre="calibrated", sinks=0), 0.4),
        (Rotation(5, 6), 0.12),
        (Rotation(6, 3, centre="calibrated", norm_correction=True), 0.4),
    )
    for name, check in conformance_cases(codec, Promises(error=error))
]
LLOYD_MAX = {  # arXiv:2504.19874, section 3.1, and J. Max, Quantizing for minimum distortion, 1960
    1: ([0.79788], 0.3634),
    2: ([0.45278, 1.51042], 0.11748),
    3: ([0.24509, 0.75601, 1.34391, 2.15195], 0.03455),
    4: ([0.12840, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259], 0.00950),
}
# Signal-to-noise ratios in decibel, N. S. Jayant and P. Noll, Digital Coding of Waveforms, 1984.
ERRORS = {bits: error for bits, (_, error) in LLOYD_MAX.items()} | {5: 10**-2.601, 6: 10**-3.189}


@pytest.mark.parametrize("check", CASES)
def test_contract(check):
    check()


def form(dim, dtype=torch.float32, **parameters):
    return Rotation(**parameters).formats(Site(Geometry((0,), 1, 1, dim), dtype)).values


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_the_codebook_is_that_of_lloyd_and_max(bits):
    upper, error = LLOYD_MAX[bits]
    half = 2 ** (bits - 1)
    assert codebook(bits)[half:] == pytest.approx(upper, abs=1e-5)
    assert codebook(bits)[:half] == tuple(-number for number in reversed(codebook(bits)[half:]))
    numbers = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    density = (-numbers.square() / 2).exp() / math.sqrt(2 * math.pi) * 18 / 200_000
    nearest = torch.tensor(codebook(bits), dtype=torch.float64)[
        torch.bucketize(numbers, torch.tensor(edges_between(codebook(bits)), dtype=torch.float64))
    ]
    assert ((numbers - nearest).square() * density).sum().item() == pytest.approx(error, abs=5e-5)


@pytest.mark.parametrize("bits", ERRORS)
def test_levels_are_the_means_of_the_numbers_that_they_stand_for(bits):
    numbers = torch.linspace(-9, 9, 60_001, dtype=torch.float64)
    density = (-numbers.square() / 2).exp()
    levels = torch.tensor(codebook(bits), dtype=torch.float64)
    nearest = (numbers[:, None] - levels).abs().argmin(-1)
    mass, moment = (torch.zeros_like(levels).index_add_(0, nearest, part) for part in (density, density * numbers))
    torch.testing.assert_close(levels, moment / mass, atol=1e-3, rtol=0)


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", ERRORS)
def test_a_code_is_that_of_the_nearest_level(bits, dtype, upper):
    """Numbers on an edge, next to one, and far outside among them."""
    edges = torch.tensor(edges_between(codebook(bits)), dtype=dtype)
    beside = [torch.nextafter(edges, torch.full_like(edges, to)) for to in (-math.inf, math.inf)]
    far = torch.tensor([0.0, -0.0, 1e30, -1e30], dtype=dtype)
    others = 3 * torch.randn(2000, dtype=dtype, generator=torch.Generator().manual_seed(bits))
    numbers = torch.cat([edges, *beside, far, others])
    expected = torch.bucketize(numbers, edges, right=upper)
    found = nearest_code(numbers[None], codebook(bits), upper_on_edge=upper)[0]
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), expected)


def test_what_is_not_a_number_has_some_code():
    assert int(nearest_code(torch.tensor([math.nan, 1.0, math.nan]), codebook(4)).max()) < 16


def test_levels_may_be_anywhere():
    levels = (-3.0, -2.99, 0.5, 7.0)
    numbers = torch.tensor([-9.0, -2.996, -2.994, -1.3, -1.2, 3.7, 3.8])
    assert nearest_code(numbers, levels).tolist() == [0, 0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("bits", ERRORS)
@pytest.mark.parametrize("content", ["normal", "one hot", "smooth"])
def test_the_error_is_that_of_the_codebook_whatever_the_vectors(bits, content):
    random = torch.Generator().manual_seed(0)
    vectors = {
        "normal": torch.randn(1, 1, 500, 128, generator=random),
        "one hot": 50 * torch.eye(128)[None, None],
        "smooth": torch.randn(1, 1, 500, 128, generator=random).cumsum(-1),
    }[content]
    half = form(128, bits=bits)
    at = torch.zeros(vectors.shape[:3])
    error = (half.decode(half.encode(vectors, at), at) - vectors).square().sum() / vectors.square().sum()
    # A vector with one number, rotated, is all 1 and -1: the error is the distance of 1 from its code.
    expected = ERRORS[bits] if content != "one hot" else min((1 - code) ** 2 for code in codebook(bits))
    assert error.item() == pytest.approx(expected, rel=0.3 if content == "smooth" else 0.03)


def test_codes_and_norms_of_a_vector():
    half = form(4, bits=2, scales="full")
    signs = torch.tensor(half.signs)
    columns = half.encode(3.0 * signs[None, None, None], torch.zeros(1, 1, 1))
    assert columns["norm"].item() == 6
    assert unpack(columns["codes"], 2, 4).flatten().tolist() == [3, 1, 1, 1]  # rotated: 2, 0, 0, 0


@pytest.mark.parametrize("bits", ERRORS)
def test_a_zero_vector_has_the_codes_nearest_to_zero(bits):
    columns = form(8, bits=bits).encode(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1))
    assert columns["norm"].item() == 0
    assert unpack(columns["codes"], bits, 8).unique().item() in (2 ** (bits - 1) - 1, 2 ** (bits - 1))


def test_a_norm_beyond_all_numbers_is_bounded():
    half = form(16, scales="full")
    vectors = torch.full((1, 1, 1, 16), torch.finfo(torch.float32).max)
    columns = half.encode(vectors, torch.zeros(1, 1, 1))
    assert columns["norm"].isfinite()
    assert half.decode(columns, torch.zeros(1, 1, 1)).isfinite().all()


DIM, SINKS = 64, 3
ROTARY = rotary_of(DIM)


def calibration(sinks=SINKS):
    random = torch.Generator().manual_seed(5)
    first, others = torch.randn(2, sinks, DIM, generator=random), 3 * torch.randn(2, DIM, generator=random)
    return {"first": first, "others": others}


def site_of(tensors, rotary=ROTARY):
    return Site(Geometry((0,), 2, 2, DIM), torch.float32, rotary=rotary, calibration=tensors)


def centred(bits=3, sinks=SINKS, **parameters):
    return Rotation(bits, centre="calibrated", sinks=sinks, **parameters).formats(site_of(calibration(sinks))).keys


def mean_at(tensors, head, position):
    """[D] float64: that of the position, or the mean over its 128 neighbours of the mean rotated to each of them."""
    first, others = (tensors[name][head].double() for name in ("first", "others"))
    if position < len(first):
        return first[position]
    span = min(position // 128, 511)
    return sum(turned(others, at) for at in range(128 * span, 128 * span + 128)) / 128


def turned(vector, position):
    """The definition, pair by pair."""
    pairs, out = DIM // 2, vector.clone()
    for i, frequency in enumerate(ROTARY.frequencies.tolist()):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[i] = vector[i] * cos - vector[i + pairs] * sin
        out[i + pairs] = vector[i + pairs] * cos + vector[i] * sin
    return out


def through(kv_format, vectors, positions):
    return kv_format.decode(kv_format.encode(vectors, positions), positions)


@pytest.mark.parametrize("norm_correction", [False, True])
def test_what_is_rotated_of_a_key_is_its_difference_from_the_mean_there(norm_correction):
    positions = torch.tensor([[0, 2, 3, 100, 130, 700, 70_000], [1, 2, 127, 128, 500, 501, 502]])[None]
    tensors = calibration()
    means = torch.stack([torch.stack([mean_at(tensors, h, p) for p in positions[0, h].tolist()]) for h in range(2)])
    keys = (means + torch.randn(1, 2, 7, DIM, generator=torch.Generator().manual_seed(3))).float()
    plain = form(DIM, bits=3, norm_correction=norm_correction)
    expected = through(plain, keys - means.float(), positions) + means
    found = through(centred(norm_correction=norm_correction), keys, positions)
    assert (found - expected).abs().mean() < 2e-3  # a coordinate may be at an edge between two codes
    assert (found - keys).square().mean() < (through(plain, keys, positions) - keys).square().mean() / 2


def test_means_do_not_depend_on_which_positions_are_read_with_them():
    """The table grows with the positions that were asked for."""
    one, other = centred(), centred()
    positions = torch.arange(600).expand(1, 2, 600)
    keys = torch.randn(1, 2, 600, DIM, generator=torch.Generator().manual_seed(3))
    at_once = one.encode(keys, positions)
    parts = [other.encode(keys[:, :, at : at + 100], positions[:, :, at : at + 100]) for at in range(0, 600, 100)]
    for name, column in at_once.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts], 2), column)


def test_values_have_no_centre_and_bits_of_their_own():
    formats = Rotation(4, 3, centre="calibrated").formats(site_of(calibration()))
    assert (formats.keys.bits, formats.values.bits) == (4, 3)
    assert formats.values.means is None
    assert formats.keys.unpacking() == "adds a mean that depends on the position"
    assert form(64, bits=2).bits == 2
    assert form(64, bits=5).unpacking() == "has more than 16 levels"


@pytest.mark.parametrize("bits", ERRORS)
def test_corrected_vectors_have_their_norm_and_the_same_direction(bits):
    vectors = torch.randn(1, 1, 300, 64, generator=torch.Generator().manual_seed(1))
    at = torch.arange(300).expand(1, 1, 300)
    corrected, plain = (
        through(form(64, bits=bits, norm_correction=how, scales="full"), vectors, at) for how in (True, False)
    )
    torch.testing.assert_close(corrected.norm(dim=-1), vectors.norm(dim=-1))
    directions = (torch.nn.functional.normalize(decoded, dim=-1) for decoded in (corrected, plain))
    torch.testing.assert_close(*directions)
    assert (
        plain.norm(dim=-1).mean().item() < vectors.norm(dim=-1).mean().item()
    )  # a level is a mean, so it is nearer to 0


def test_a_calibration_is_the_mean_key_of_each_sink_and_of_the_others_before_rotation():
    random = torch.Generator().manual_seed(1)
    queries, keys, values = (torch.randn(3, heads, 20, DIM, generator=random) for heads in (4, 2, 2))
    sample = Sample(Geometry((0,), 4, 2, DIM), 0.125, ROTARY, queries, keys, values)
    (found,) = Rotation(centre="calibrated", sinks=5).calibrate([sample])
    torch.testing.assert_close(found["first"], keys[:, :, :5].mean(0))
    others = sum(turned(keys[s, :, t].double().T, -t).T for s in range(3) for t in range(5, 20)) / 45
    torch.testing.assert_close(found["others"], others.float())
    assert Rotation().calibrate([sample]) == [{}]
    (short,) = Rotation(centre="calibrated", sinks=30).calibrate([sample])
    assert short["first"].shape == (2, 20, DIM)
    assert not short["others"].any()


@pytest.mark.parametrize(
    ("tensors", "rotary", "said"),
    [
        ({}, ROTARY, "needs a calibration: 'calibrated'"),
        ({"others": torch.zeros(1, 64)}, ROTARY, r"others must be float32 \[2, 64\]: torch.float32 \[1, 64\]"),
        ({"first": torch.zeros(2, 3)}, ROTARY, r"first must be float32 \[2, 3, 64\]: torch.float32 \[2, 3\]"),
        ({"first": torch.zeros(2, 3, 64).double()}, ROTARY, r"first must be float32 .*: torch.float64 \[2, 3, 64\]"),
        ({"others": torch.zeros(2, 64)}, None, "needs the rotary embedding of the model, to undo it: it is not known"),
    ],
)
def test_a_calibration_that_is_not_of_this_model_is_refused(tensors, rotary, said):
    site = site_of({**calibration(), **tensors} if tensors else {}, rotary)
    with pytest.raises(ParameterError, match=f"^centre: {said}$"):
        Rotation(centre="calibrated").formats(site)


def test_the_seed_decides_the_signs():
    signs = [form(64, seed=seed).signs for seed in (0, 0, 1)]
    assert signs[0] == signs[1] != signs[2]
    assert set(signs[0]) == {1, -1}
    assert form(64, residual=9).packed_length(42) == 32


@pytest.mark.parametrize("dim", [48, 80, 96])
def test_the_head_dimension_must_be_a_power_of_two(dim):
    with pytest.raises(ParameterError, match=f"^rotation: must have a head dimension that is a power of two: {dim}$"):
        form(dim)


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_bytes_of_a_vector(bits):
    half = form(128, torch.bfloat16, bits=bits)
    assert sum(column.bytes_per_slot for column in half.columns.values()) == 128 * bits / 8 + 2


def test_means_that_were_first_read_in_inference_mode_can_be_differentiated_by():
    keys, positions = torch.ones(1, 2, 4, DIM), torch.arange(4).expand(1, 2, 4)
    kv_format = centred()
    with torch.inference_mode():
        means = kv_format.means.at(positions, torch.float32)
    queries = torch.ones(1, 2, 4, DIM, requires_grad=True)
    (queries * kv_format.decode_in_basis(kv_format.encode(keys, positions), positions, torch.float32)).sum().backward()
    assert queries.grad.isfinite().all()
    assert means.is_inference()


def test_what_was_first_used_in_inference_mode_can_be_differentiated():
    _sylvester.cache_clear()
    vectors = torch.ones(3, 16)
    with torch.inference_mode():
        hadamard(vectors)
    vectors.requires_grad_()
    hadamard(vectors).square().sum().backward()
    torch.testing.assert_close(vectors.grad, 2 * 16 * vectors)
