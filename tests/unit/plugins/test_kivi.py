"""Keys quantised per channel, values per token."""

import pytest
import torch

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Geometry, Site
from kvpolicy.stages.conformance import Promises, conformance_cases
from kvpolicy_plugins.codecs.kivi import Kivi
from kvpolicy_plugins.codecs.shared.packing import unpack

VARIANTS = (Kivi(), Kivi(2, 8, 64, 64, "full"), Kivi(8, 2, group=16, residual=16))
CASES = [
    pytest.param(check, id=f"{number}: {name}")
    for number, codec in enumerate(VARIANTS)
    for name, check in conformance_cases(codec, Promises(error=1.1 / (2 ** min(codec.bits, codec.value_bits or 9) - 1)))
]


@pytest.mark.parametrize("check", CASES)
def test_contract(check):
    check()


def formats(codec, dim=4, dtype=torch.float32):
    return codec.formats(Site(Geometry((0,), 2, 1, dim), dtype))


def test_a_group_of_keys_is_a_channel_of_neighbouring_tokens():
    keys = torch.tensor([[0.0, 10, 7, -1], [1, 40, 7, -1], [2, 20, 7, 2], [3, 30, 7, -1]])
    half = formats(Kivi(2, group=4, residual=4)).keys
    columns = half.encode(keys[None, None], torch.arange(4)[None, None])
    assert unpack(columns["codes"], 2, 4)[0, 0, 0].tolist() == [[0, 0, 0, 0], [1, 3, 0, 0], [2, 1, 0, 3], [3, 2, 0, 0]]
    assert columns["scale"].tolist() == [[[[1, 10, 0, 1]]]]
    assert columns["minimum"].tolist() == [[[[0, 10, 7, -1]]]]
    assert torch.equal(half.decode(columns, torch.arange(4)[None, None])[0, 0], keys)


def test_a_group_of_values_is_neighbouring_channels_of_a_token():
    values = torch.tensor([[0.0, 1, 2, 3, 7, 7, 7, 7], [-6, 0, 3, -3, 40, 10, 20, 30]])
    half = formats(Kivi(8, 2, group=4, residual=4), dim=8).values
    columns = half.encode(values[None, None], torch.arange(2)[None, None])
    assert unpack(columns["codes"], 2, 8)[0, 0].tolist() == [[0, 1, 2, 3, 0, 0, 0, 0], [0, 2, 3, 1, 3, 0, 1, 2]]
    assert columns["scale"].tolist() == [[[[1, 0], [3, 10]]]]
    assert columns["minimum"].tolist() == [[[[0, 7], [-6, 10]]]]
    assert torch.equal(half.decode(columns, torch.arange(2)[None, None])[0, 0], values)


def test_halves_are_rounded_to_even():
    half = formats(Kivi(2, group=4, residual=4)).values
    columns = half.encode(torch.tensor([[0.5, 1.5, 2.5, 0], [0, 3, 0, 0]])[:, None, None], torch.zeros(2, 1, 1))
    assert unpack(columns["codes"], 2, 4).flatten(0, 2)[0].tolist() == [1, 2, 3, 0]  # a step is 5/6 here
    columns = half.encode(torch.tensor([0.5, 1.5, 3, 0])[None, None, None], torch.zeros(1, 1, 1))
    assert unpack(columns["codes"], 2, 4).flatten().tolist() == [0, 2, 3, 0]


def test_keys_are_packed_all_at_once_and_values_one_by_one():
    both = formats(Kivi(group=4, residual=8, batch=1))
    assert [both.keys.packed_length(length) for length in (7, 8, 15, 16, 17)] == [0, 8, 8, 16, 16]
    assert [both.values.packed_length(length) for length in (7, 8, 9, 17)] == [0, 0, 1, 9]
    assert (both.keys.group_size, both.values.group_size) == (4, 1)
    together = formats(Kivi(group=4, residual=8)).values
    assert [together.packed_length(length) for length in (39, 40, 71, 72)] == [0, 32, 32, 64]


def test_columns_are_those_of_the_parameters():
    both = formats(Kivi(2, 4, group=16, residual=32), dim=64, dtype=torch.bfloat16)
    shapes = {name: (column.shape, column.dtype) for name, column in both.keys.columns.items()}
    assert shapes == {
        "codes": ((16, 16), torch.uint8),
        "scale": ((64,), torch.float16),
        "minimum": ((64,), torch.float16),
    }
    shapes = {name: (column.shape, column.dtype) for name, column in both.values.columns.items()}
    assert shapes == {"codes": ((32,), torch.uint8), "scale": ((4,), torch.float16), "minimum": ((4,), torch.float16)}
    full = formats(Kivi(group=16, residual=32, scales="full"), dim=64, dtype=torch.bfloat16)
    assert full.keys.columns["scale"].dtype == full.values.columns["minimum"].dtype == torch.bfloat16


def test_what_float16_cannot_hold_is_bounded_not_infinite():
    half = formats(Kivi(8, group=4, residual=4)).values
    values = torch.tensor([-1e6, 1e6, 0, 5])[None, None, None]
    decoded = half.decode(half.encode(values, torch.zeros(1, 1, 1)), torch.zeros(1, 1, 1)).flatten()
    assert decoded.isfinite().all()
    assert decoded[0] == -65504
    assert decoded[1] > 65504


def test_a_minimum_that_is_rounded_down_costs_little():
    half = formats(Kivi(4, group=4, residual=4)).values
    values = torch.tensor([1000.2, 1000.21, 1000.22, 1000.23])[None, None, None]  # the nearest float16 is 1000
    columns = half.encode(values, torch.zeros(1, 1, 1))
    assert columns["minimum"].item() == 1000
    assert (half.decode(columns, torch.zeros(1, 1, 1)) - values).abs().max() < 0.009


def test_a_step_too_small_for_float16_leaves_the_minimum():
    half = formats(Kivi(2, group=4, residual=4)).values
    columns = half.encode(torch.tensor([0, 0, 0, 3e-8])[None, None, None], torch.zeros(1, 1, 1))
    assert not columns["scale"].any()
    assert not columns["codes"].any()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"residual": 100}, "residual: must be a multiple of group, which is 32: 100"),
        ({"residual": 0}, "residual: must be an integer from 1 to 1000000000: 0"),
        ({"group": 0}, "group: must be an integer from 1 to 4096: 0"),
        ({"bits": 3}, "bits: must be one of 2, 4, 8: 3"),
        ({"value_bits": 1}, "value_bits: must be one of 0, 2, 4, 8: 1"),
        ({"scales": "quarter"}, "scales: must be one of half, full: 'quarter'"),
    ],
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(ParameterError) as caught:
        Kivi(**parameters)
    assert str(caught.value) == message


def test_groups_must_divide_the_vectors_of_the_model():
    with pytest.raises(ParameterError, match=r"^group: must divide the head dimension 80 of this model: 32$"):
        formats(Kivi(), dim=80)
