"""Checks of calibrated tensors, for codecs."""

from torch import Tensor

from kvpolicy.errors import ParameterError, shown


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ParameterError if a calibrated tensor is not floating point or has NaN or infinity."""
    if not tensor.is_floating_point():
        raise ParameterError(f"{shown(name)} must be floating point: {tensor.dtype}")
    if not bool(tensor.isfinite().all()):
        raise ParameterError(f"{shown(name)} must be finite: it has NaN or infinity")
