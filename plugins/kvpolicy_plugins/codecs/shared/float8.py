"""Float8 numbers (e4m3) as bytes, because few operations of torch support that dtype."""

import torch
from torch import Tensor

_E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(_E4M3).max
_ALL_BUT_TOP_EXPONENT_BIT = -0x4001  # mask over the bits of a float16


def to_bytes(numbers: Tensor) -> Tensor:
    """The nearest float8 numbers, half to even, as bytes; numbers beyond the largest become the largest."""
    # Clamped, because in some versions of torch what is beyond the largest code becomes NaN.
    return numbers.clamp(-LARGEST, LARGEST).to(_E4M3).view(torch.uint8)


def bytes_over_256(codes: Tensor) -> Tensor:
    """Float8 numbers, given as bytes, divided by 256, in float16: exact, and much faster than a conversion on a CPU.

    The sign keeps its bit, exponent and mantissa move below the top exponent bit. The biases differ by 8, hence 256.
    """
    shifted = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    return shifted.bitwise_and_(_ALL_BUT_TOP_EXPONENT_BIT).view(torch.float16)
