"""Float8 numbers (e4m3) as bytes, because few operations of torch support that dtype, and a format of these."""

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Column, Format, PackedColumn, Unpacking
from kvpolicy_plugins.codecs.shared.affine import cast_clamped, compute_dtype

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


@attrs.frozen(eq=False)
class Float8(Format):
    """Each number in float8_e4m3fn, without a scale."""

    dim: int  # D
    dtype: torch.dtype  # of the model's own vectors
    residual_length: int = 0
    step: int = 1
    columns: Mapping[str, Column] = attrs.field(init=False)

    @columns.default
    def _columns(self) -> dict[str, Column]:
        return {"codes": Column((self.dim,), torch.uint8)}

    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 at any position
        return {"codes": to_bytes(vectors)}

    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:  # noqa: ARG002
        exact = bytes_over_256(columns["codes"]).to(compute_dtype(self.dtype))
        return cast_clamped(exact.mul_(256), self.dtype)

    def unpacking(self) -> Unpacking | str:
        from kvpolicy_kernels.quantise.unpack import fp8

        return Unpacking(fp8, (PackedColumn(self.dim, torch.uint8),))
