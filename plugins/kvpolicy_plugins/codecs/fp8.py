"""Codec `fp8`: float8 with a scale per vector."""

from collections.abc import Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Codec, Column, Format, Formats, Integer, PackedColumn, Site, Unpacking, parameter
from kvpolicy_plugins.codecs.shared.affine import cast_clamped, compute_dtype
from kvpolicy_plugins.codecs.shared.float8 import LARGEST, bytes_over_256, to_bytes


@attrs.frozen(eq=False)
class Scaled(Format):
    """Each vector divided by its largest magnitude, in float8_e4m3fn."""

    dim: int  # D
    dtype: torch.dtype  # of the model's own vectors
    residual_length: int = 0
    step: int = 1
    columns: Mapping[str, Column] = attrs.field(init=False)

    @columns.default
    def _columns(self) -> dict[str, Column]:
        return {"codes": Column((self.dim,), torch.uint8), "peak": Column((), torch.float16)}

    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 at any position
        exact = vectors.to(compute_dtype(vectors.dtype))
        peak = cast_clamped(exact.abs().amax(-1), torch.float16)
        scale = (peak.to(exact.dtype) / LARGEST)[..., None]
        codes = to_bytes(exact / scale.masked_fill(scale == 0, torch.inf))  # a rounded peak may be below the vector's
        return {"codes": codes, "peak": peak}

    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:  # noqa: ARG002
        exact = compute_dtype(self.dtype)
        scale = columns["peak"].to(exact) * (256 / LARGEST)
        return cast_clamped(bytes_over_256(columns["codes"]).to(exact).mul_(scale[..., None]), self.dtype)

    def unpacking(self) -> Unpacking | str:
        from kvpolicy_kernels.quantise.unpack import scaled_fp8

        return Unpacking(scaled_fp8, (PackedColumn(self.dim, torch.uint8), PackedColumn(1, torch.float16)))


@attrs.frozen
class Fp8(Codec):
    """Float8 (e4m3) with one float16 scale for each token and head: half the size, with little loss.

    A scale of a whole tensor, chosen at the first tokens, saturates when larger numbers come later; a scale per
    vector does not.
    """

    name: ClassVar[str] = "fp8"
    reference: ClassVar[str] = "arXiv:2209.05433"

    residual: int = parameter(Integer(minimum=0), 0, help="how many of the newest entries are not packed")
    batch: int = parameter(Integer(minimum=1), 16, help="how many entries are packed at a time; 1 = each as it comes")

    def formats(self, site: Site) -> Formats:
        scaled = Scaled(site.geometry.head_dim, site.dtype, self.residual, self.batch)
        return Formats(scaled, scaled)
