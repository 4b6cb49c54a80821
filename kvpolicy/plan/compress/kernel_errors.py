"""How kernels say that they cannot: then the reference runs instead, and that is said once."""

import logging

from kvpolicy_kernels import UnsupportedInputError

_logger = logging.getLogger("kvpolicy")
_noted: set[str] = set()  # in this process


def kernel_errors() -> tuple[type[Exception], ...]:
    """What launchers raise for inputs that they cannot serve, and Triton for what does not compile or fit."""
    from triton.errors import TritonError

    return UnsupportedInputError, TritonError


def note_once(reason: str) -> None:
    """Log why a reference runs instead of a kernel; the same reason only once in a process."""
    if reason not in _noted:
        _noted.add(reason)
        _logger.warning(reason)
