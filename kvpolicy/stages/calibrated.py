"""What codecs check of a calibration."""

from torch import Tensor

from kvpolicy.errors import ParameterError, shown


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ParameterError unless a calibrated tensor is floating and holds neither NaN nor infinity."""
    if not tensor.is_floating_point():
        raise ParameterError(f"{shown(name)} must be floating: {tensor.dtype}")
    if not bool(tensor.isfinite().all()):
        raise ParameterError(f"{shown(name)} must be finite: it holds NaN or infinity")
