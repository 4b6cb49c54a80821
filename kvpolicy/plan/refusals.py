"""How kernels say that they cannot: then the reference runs instead."""

from kvpolicy_kernels import UnsupportedInputError


def refusals() -> tuple[type[Exception], ...]:
    """What launchers raise for inputs that they cannot serve, and Triton for what does not compile or fit."""
    from triton.errors import TritonError

    return UnsupportedInputError, TritonError
