"""What a device can do at most: the rates that floors follow from."""

import attrs

from kvpolicy.errors import InputError, did_you_mean, shown


@attrs.frozen
class Device:
    """A device and its rates. Measured ones are what generic programs reach; nominal ones are the vendor's peaks."""

    name: str
    capability: int  # CUDA compute capability: 90 for sm_90
    bandwidth: float  # bytes per second between device memory and chip, read and written together
    tensor_flops: float  # operations per second, bfloat16 products of dense matrices accumulated in float32
    measured: bool
    source: str

    def floor(self, nbytes: float, flops: float = 0.0) -> float:
        """Seconds below which `nbytes` cannot be moved while `flops` are computed: the larger of both times."""
        return max(nbytes / self.bandwidth, flops / self.tensor_flops)


_DEVICES = (
    Device(
        "h200", 90, 4.3e12, 790e12, True, "device copy, and products of 8192 x 8192 random matrices, on one H200 SXM"
    ),
    Device(
        "b200", 100, 8.0e12, 2250e12, False, "NVIDIA DGX B200 data sheet (an eighth of it; half of the sparse rate)"
    ),
    Device("h100", 90, 3.35e12, 989.5e12, False, "NVIDIA H100 data sheet, SXM (half of the sparse rate)"),
    Device("a100", 80, 2.039e12, 312e12, False, "NVIDIA A100 data sheet, 80 GB SXM"),
    Device("l40s", 89, 0.864e12, 362.05e12, False, "NVIDIA L40S data sheet"),
)
DEVICES = {device.name: device for device in _DEVICES}


def device_named(name: str) -> Device:
    """The device called `name`, whatever its case. Raises InputError when there is none."""
    device = DEVICES.get(name.lower())
    if device is None:
        raise InputError(f"unknown device: {shown(name)}{did_you_mean(name.lower(), DEVICES, 'known')}")
    return device
