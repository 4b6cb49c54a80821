"""Numbers of 8 bits with an exponent of their own."""

from collections.abc import Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Codec, Column, Format, Formats, Integer, PackedColumn, Site, Unpacking, parameter
from kvpolicy_plugins.codecs.shared.affine import cast_clamped, compute_dtype

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
_NO_EXPONENT_TOP = -0x4001  # all bits of an int16 but the top one of a half's exponent


@attrs.frozen(eq=False)
class Scaled(Format):
    """Each vector over its largest magnitude, in float8_e4m3fn."""

    dim: int  # D
    dtype: torch.dtype  # of the model's own vectors
    residual_length: int = 0
    columns: Mapping[str, Column] = attrs.field(init=False)

    @columns.default
    def _columns(self) -> dict[str, Column]:
        # Bytes rather than float8: few operations of torch know that dtype.
        return {"codes": Column((self.dim,), torch.uint8), "peak": Column((), torch.float16)}

    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 wherever they stand
        exact = vectors.to(compute_dtype(vectors.dtype))
        peak = cast_clamped(exact.abs().amax(-1), torch.float16)
        scale = (peak.to(exact.dtype) / _LARGEST)[..., None]
        # What rounding the peak puts above the largest code becomes NaN with some versions of torch.
        codes = (exact / scale.masked_fill(scale == 0, torch.inf)).clamp_(-_LARGEST, _LARGEST)
        return {"codes": codes.to(_E4M3).view(torch.uint8), "peak": peak}

    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:  # noqa: ARG002
        exact = compute_dtype(self.dtype)
        scale = columns["peak"].to(exact) * (256 / _LARGEST)
        return cast_clamped(_over_256(columns["codes"]).to(exact).mul_(scale[..., None]), self.dtype)

    def unpacking(self) -> Unpacking | str:
        from kvpolicy_kernels.quantise.unpack import scaled_fp8

        return Unpacking(scaled_fp8, (PackedColumn(self.dim, torch.uint8), PackedColumn(1, torch.float16)))


@attrs.frozen
class Fp8(Codec):
    """Float8 (e4m3) with one float16 scale for each token and head: half the size, and next to no loss.

    A scale for a whole tensor, chosen at the first tokens, saturates with larger ones that come later; a scale for
    each vector never does.
    """

    name: ClassVar[str] = "fp8"
    reference: ClassVar[str] = "arXiv:2209.05433"

    residual: int = parameter(Integer(minimum=0), 0, help="how many of the newest entries stay as they are")

    def formats(self, site: Site) -> Formats:
        one = Scaled(site.geometry.head_dim, site.dtype, self.residual)
        return Formats(one, one)


def _over_256(codes: Tensor) -> Tensor:
    """Float8 numbers, given as bytes, over 256, in float16: exact, and much faster than a conversion on a CPU.

    Sign to sign, exponent and mantissa to the places below the top exponent bit; the biases differ by 8, hence 256.
    """
    shifted = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    return shifted.bitwise_and_(_NO_EXPONENT_TOP).view(torch.float16)
