"""What all heads share is held once, and what is left is quantised."""

import itertools

import pytest
import torch

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Geometry, Sample, Site
from kvpolicy.stages.conformance import Promises, conformance_cases
from kvpolicy_plugins.codecs.kivi import Kivi
from kvpolicy_plugins.codecs.shared.calibrated.bit_allocation import allocate_bits
from kvpolicy_plugins.codecs.shared.packing import unpack
from kvpolicy_plugins.codecs.tada import Tada

HEADS, GROUP, DIM = 2, 2, 16
GEOMETRY = Geometry((0, 1, 2), HEADS * GROUP, HEADS, DIM)
CASES = [
    pytest.param(check, id=f"{number}: {name}")
    for number, (codec, error) in enumerate(
        (
            (Tada(), 0.1),
            (Tada(2, 16, 5, 3, "full"), 0.5),
            (Tada(8, residual=0, batch=1), 0.01),
            (Tada("auto", mean_bits=8), 0.5),
        )
    )
    for name, check in conformance_cases(codec, Promises(error=error))
]


@pytest.mark.parametrize("check", CASES)
def test_contract(check):
    check()


def site(bits=None, dtype=torch.float32):
    return Site(GEOMETRY, dtype, calibration={} if bits is None else {"bits": torch.tensor(bits)})


def sample(seed, sharpness=1.0, apart=1.0):
    """A layer whose heads differ by `apart`, and whose queries are `sharpness` long."""
    random = torch.Generator().manual_seed(seed)

    def normal(heads):
        return torch.randn(2, heads, 24, DIM, generator=random)

    keys, values = (normal(1) + apart * normal(HEADS) for _ in range(2))
    return Sample(GEOMETRY, 0.3, None, sharpness * normal(HEADS * GROUP), keys, values)


def test_kernels_read_the_mean_and_the_columns_of_all_heads():
    how = Tada(2, 8).formats(site()).keys.unpacking()
    widths = [(column.width, column.dtype) for column in how.columns]
    groups = HEADS * DIM // 8
    assert widths == [
        (DIM, torch.float16),
        (HEADS * DIM // 4, torch.uint8),
        (groups, torch.float16),
        (groups, torch.float16),
    ]
    assert how.options == (2, 8, HEADS)
    assert how.joint


@pytest.mark.parametrize("codec", [Tada(2, 12), Kivi(2, group=12, residual=12)], ids=lambda codec: codec.name)
def test_kernels_read_no_groups_of_another_size_than_a_power_of_two(codec):
    formats = codec.formats(Site(Geometry((0,), 2, 2, 24), torch.float32))
    assert formats.values.unpacking() == "has groups of 12 channels, not a power of two"


def test_the_mean_over_heads_and_what_is_left():
    vectors = torch.tensor([[[0.0, 10, 7, -2]], [[6, 4, 7, 2]]])[None]  # two heads, one token
    half = Tada(2).formats(Site(Geometry((0,), 2, 2, 4), torch.float32)).keys
    columns = half.encode(vectors, torch.zeros(1, 2, 1))
    assert columns["mean"].tolist() == [[[[3, 7, 7, 0]]]]
    assert columns["minimum"].tolist() == [[[[[-3], [-3]]]]]  # of 3, -3, 0, 2 and of -3, 3, 0, -2
    assert columns["scale"].tolist() == [[[[[2], [2]]]]]
    assert unpack(columns["codes"], 2, 4).tolist() == [[[[[3, 0, 2, 2], [0, 3, 2, 0]]]]]  # halves to even
    decoded = half.decode(columns, torch.zeros(1, 2, 1))
    assert decoded.tolist() == [[[[0, 10, 6, -1]], [[6, 4, 6, 3]]]]


def test_a_mean_that_is_rounded_costs_nothing():
    noise = torch.randn(1, 2, 6, 16, generator=torch.Generator().manual_seed(0))
    vectors = 1000.2 + 0.01 * noise  # the nearest float16 to the mean is 0.2 away
    half = Tada(4).formats(site()).keys
    at = torch.zeros(1, 2, 6)
    decoded = half.decode(half.encode(vectors, at), at)
    assert (decoded - vectors).abs().max() < 0.004
    assert decoded.is_contiguous()


def test_columns_are_those_of_the_parameters():
    half = Tada(4, group=8).formats(site(dtype=torch.bfloat16)).values
    assert {name: (column.shape, column.dtype) for name, column in half.columns.items()} == {
        "mean": ((16,), torch.float16),
        "codes": ((2, 8), torch.uint8),
        "scale": ((2, 2), torch.float16),
        "minimum": ((2, 2), torch.float16),
    }
    full = Tada(scales="full").formats(site(dtype=torch.bfloat16)).keys
    assert full.columns["mean"].dtype == full.columns["scale"].dtype == torch.bfloat16
    assert half.joint
    assert Tada().joint


def test_what_exceeds_the_residual_is_packed_in_batches():
    half = Tada(residual=10, batch=4).formats(site()).keys
    assert [half.packed_length(length) for length in (10, 13, 14, 17, 18)] == [0, 0, 4, 4, 8]


def test_groups_must_divide_the_vectors_of_the_model():
    with pytest.raises(ParameterError, match=r"^group: must divide the head dimension 16 of this model: 5$"):
        Tada(group=5).formats(site())


def test_auto_needs_a_calibration():
    assert Tada("auto").calibrated
    assert not Tada(8).calibrated
    with pytest.raises(ParameterError, match=r"^bits: needs a calibration: 'auto'$"):
        Tada("auto").formats(site())
    with pytest.raises(ParameterError, match=r"^bits: must be one of 2, 4, 8 in the calibration: 3$"):
        Tada("auto").formats(site(3))
    assert Tada("auto").formats(site(8)).values.bits == 8
    assert Tada(4).formats(site(8)).values.bits == 4


def test_fixed_bits_need_no_calibration():
    assert Tada(4).calibrate([sample(0), sample(1)]) == [{}, {}]
    assert Tada("auto").calibrate([]) == []


@pytest.mark.parametrize("mean_bits", [2, 2.5, 3.34, 4, 5.5, 8])
def test_a_calibration_is_the_best_of_all_choices(mean_bits):
    samples = [sample(0), sample(1, sharpness=4), sample(2, apart=0.1)]
    found = Tada("auto", mean_bits=mean_bits).calibrate(samples)
    errors = [{bits: relative_error(one, bits) for bits in (2, 4, 8)} for one in samples]
    fitting = [bits for bits in itertools.product((2, 4, 8), repeat=3) if sum(bits) <= 3 * mean_bits + 1e-9]
    best = min(fitting, key=lambda bits: sum(error[one] for error, one in zip(errors, bits, strict=True)))
    assert [layer["bits"].item() for layer in found] == list(best)
    assert all(layer["bits"].dtype == torch.int64 and layer["bits"].shape == () for layer in found)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sensitivity_is_the_error_of_causal_attention(bits):
    one = sample(5, sharpness=2)
    assert Tada("auto")._error(one, bits) == pytest.approx(relative_error(one, bits), rel=1e-4)


def relative_error(one, bits):
    """By a plain float64 form of causal attention."""
    half = Tada(bits).formats(site()).keys
    at = torch.arange(one.keys.shape[2]).expand(one.keys.shape[:3])
    exact = plain_attention(one, one.keys, one.values)
    found = plain_attention(one, *(half.decode(half.encode(part, at), at) for part in (one.keys, one.values)))
    return ((found - exact).norm() / exact.norm()).item()


def plain_attention(one, keys, values):
    queries = one.queries.double().unflatten(1, (HEADS, GROUP))
    logits = one.scaling * queries @ keys.double()[:, :, None].mT
    later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -torch.inf).softmax(-1) @ values.double()[:, :, None]


def test_least_error_is_the_best_of_all_choices():
    random = torch.Generator().manual_seed(0)
    costs = (2, 4, 8)
    for layers, capacity in itertools.product((1, 2, 5), (1.0, 1.3, 2.2, 4.0)):
        errors = torch.rand(layers, 3, generator=random).tolist()
        room = int(2 * layers * capacity)
        choices = [one for one in itertools.product(range(3), repeat=layers) if sum(costs[w] for w in one) <= room]
        best = min(choices, key=lambda one: sum(error[w] for error, w in zip(errors, one, strict=True)))
        assert allocate_bits(errors, costs, room) == best


def test_least_error_breaks_ties_by_cost_and_then_by_layer():
    assert allocate_bits([[1.0, 1.0, 1.0]] * 3, (2, 4, 8), 24) == (0, 0, 0)
    assert allocate_bits([[2.0, 1.0], [2.0, 1.0]], (2, 4), 6) == (0, 1)
