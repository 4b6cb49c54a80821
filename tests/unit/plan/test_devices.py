"""The device table: rates in plausible proportions, names that are found or corrected."""

import pytest

from kvpolicy.errors import InputError
from kvpolicy.plan.explain.devices import DEVICES, device_named


@pytest.mark.parametrize("name", ["h200", "H200"])
def test_device_is_found_by_name(name):
    device = device_named(name)

    assert (device.name, device.capability, device.measured) == ("h200", 90, True)


@pytest.mark.parametrize(
    ("name", "said"),
    [("h201", "did you mean 'h200'"), ("a10", "did you mean 'a100'"), ("tpu", "known: h200, b200, h100, a100, l40s")],
)
def test_unknown_device_is_refused(name, said):
    with pytest.raises(InputError, match=f"unknown device: '{name}'.*{said}"):
        device_named(name)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_rates_are_in_base_units(device):
    assert 0.5e12 < device.bandwidth < 1e13
    assert 100 < device.tensor_flops / device.bandwidth < 500  # the ridge of the roofline, operations per byte
    assert device.source


def test_names_are_those_of_the_devices():
    assert all(name == device.name for name, device in DEVICES.items())


# 25.2 MB and 2.7 us of products at T=8192, W=32, N=1024: memory bound. The full R-KV scan at T=8192 is compute bound.
@pytest.mark.parametrize(
    ("nbytes", "flops", "microseconds"), [(25.2e6, 2.1e9, 5.86), (16.8e6, 137e9, 173.4), (0, 0, 0)]
)
def test_floor_is_the_larger_time(nbytes, flops, microseconds):
    assert device_named("h200").floor(nbytes, flops) * 1e6 == pytest.approx(microseconds, rel=1e-2)
