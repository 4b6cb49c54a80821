"""Values between the minimum and the maximum of each, clipped or not, as they are or in a rotated basis."""

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Column, Format, PackedColumn, Unpacking
from kvpolicy_plugins.codecs.shared.affine import cast_clamped, compute_dtype, dequantise_tokens, quantise_half_up
from kvpolicy_plugins.codecs.shared.calibrated.basis import Basis
from kvpolicy_plugins.codecs.shared.packing import packed_size


@attrs.frozen(eq=False)
class MinMaxValues(Format):
    """All channels of a token are one quantisation group, with codes rounded half up.

    They are those of a basis, where there is a `rotation`. With `clip` magnitudes are limited to one of the token
    itself: that of rank `clip`, counted from 0, from the smallest.
    """

    dim: int  # D
    dtype: torch.dtype  # of the model's own vectors
    stored: torch.dtype  # of scales and minima
    bits: int
    residual_length: int = 0
    step: int = 1
    clip: int | None = None  # at most D - 1; None = nothing is clipped
    rotation: Basis | None = None  # None = the basis of the model
    columns: Mapping[str, Column] = attrs.field(init=False)

    @columns.default
    def _columns(self) -> dict[str, Column]:
        codes = Column((packed_size(self.dim, self.bits),), torch.uint8)
        return {"codes": codes, "scale": Column((1,), self.stored), "minimum": Column((1,), self.stored)}

    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 at any position
        exact = vectors.to(compute_dtype(vectors.dtype))
        if self.rotation is not None:
            largest = torch.finfo(exact.dtype).max / (4 * self.dim)  # of which a sum is not infinite
            exact = self.to_basis(exact.clamp(-largest, largest))
        if self.clip is not None:
            limit = exact.abs().kthvalue(self.clip + 1, dim=-1, keepdim=True).values
            exact = exact.clamp(-limit, limit)
        codes, scale, minimum = quantise_half_up(exact, self.bits, self.stored)
        return {"codes": codes, "scale": scale, "minimum": minimum}

    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        exact = compute_dtype(self.dtype)
        return cast_clamped(self.from_basis(self.decode_in_basis(columns, positions, exact)), self.dtype)

    def to_basis(self, vectors: Tensor) -> Tensor:
        return vectors if self.rotation is None else self.rotation.to(vectors)

    def queries_to_basis(self, queries: Tensor) -> Tensor:
        return queries if self.rotation is None else self.rotation.dual(queries)

    def from_basis(self, vectors: Tensor) -> Tensor:
        return vectors if self.rotation is None else self.rotation.back(vectors)

    def decode_in_basis(self, columns: Mapping[str, Tensor], positions: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        codes, scale, minimum = (columns[name] for name in ("codes", "scale", "minimum"))
        return dequantise_tokens(codes, scale, minimum, self.dim, self.bits, dtype)

    def unpacking(self) -> Unpacking | str:
        if self.rotation is not None:
            return "reads a calibrated basis"
        from kvpolicy_kernels.quantise.unpack import per_vector

        codes, each = PackedColumn(packed_size(self.dim, self.bits), torch.uint8), PackedColumn(1, self.stored)
        return Unpacking(per_vector, (codes, each, each), options=(self.bits,))
