"""Tokens whose neighbouring channels share a scale and a minimum: asymmetric quantisation along the channels."""

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Column, Format, PackedColumn, Unpacking
from kvpolicy_plugins.codecs.shared.affine import dequantise_tokens, quantise_tokens
from kvpolicy_plugins.codecs.shared.packing import packed_size


@attrs.frozen(eq=False)
class PerToken(Format):
    """Each `group` of neighbouring channels of a token is a quantisation group."""

    dim: int  # D
    dtype: torch.dtype  # of the model's own vectors
    stored: torch.dtype  # of scales and minima
    bits: int
    group: int  # divides D
    residual_length: int = 0
    step: int = 1
    columns: Mapping[str, Column] = attrs.field(init=False)

    @columns.default
    def _columns(self) -> dict[str, Column]:
        scales = Column((self.dim // self.group,), self.stored)
        codes = Column((packed_size(self.dim, self.bits),), torch.uint8)
        return {"codes": codes, "scale": scales, "minimum": scales}

    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 at any position
        codes, scale, minimum = quantise_tokens(vectors, self.group, self.bits, self.stored)
        return {"codes": codes, "scale": scale, "minimum": minimum}

    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        return self.decode_in_basis(columns, positions, self.dtype)

    def decode_in_basis(self, columns: Mapping[str, Tensor], positions: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        codes, scale, minimum = (columns[name] for name in ("codes", "scale", "minimum"))
        return dequantise_tokens(codes, scale, minimum, self.dim, self.bits, dtype)

    def unpacking(self) -> Unpacking | str:
        from kvpolicy_kernels.quantise.unpack import per_token

        if self.group.bit_count() != 1:
            return f"has groups of {self.group} channels, not a power of two"
        codes = PackedColumn(packed_size(self.dim, self.bits), torch.uint8)
        scales = PackedColumn(self.dim // self.group, self.stored)
        return Unpacking(per_token, (codes, scales, scales), options=(self.bits, self.group))
