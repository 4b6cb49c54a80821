"""How the codec `tada` holds the vectors of a token: their mean over the heads, and each head's difference from it."""

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Column, Format, PackedColumn, Unpacking
from kvpolicy_plugins.codecs.shared.affine import cast_clamped, compute_dtype
from kvpolicy_plugins.codecs.shared.per_token import PerToken


@attrs.frozen(eq=False)
class Centred(Format):
    """The mean over the KV heads of a token, and each head's difference from it, quantised along its channels."""

    heads: int  # K
    dim: int  # D
    dtype: torch.dtype  # of the model's own vectors
    stored: torch.dtype  # of means, scales and minima
    bits: int
    group: int  # divides D
    residual_length: int = 0
    step: int = 1
    joint: bool = True
    _differences: PerToken = attrs.field(init=False, repr=False)
    columns: Mapping[str, Column] = attrs.field(init=False)

    @_differences.default
    def _per_token(self) -> PerToken:
        return PerToken(self.dim, self.dtype, self.stored, self.bits, self.group)

    @columns.default
    def _columns(self) -> dict[str, Column]:
        own = self._differences.columns.items()
        of_heads = {name: Column((self.heads, *column.shape), column.dtype) for name, column in own}
        return {"mean": Column((self.dim,), self.stored), **of_heads}

    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:
        exact = vectors.to(compute_dtype(vectors.dtype)).movedim(1, 2)
        # Within this limit neither the sum over the heads nor a difference of two numbers is infinite.
        limit = torch.finfo(exact.dtype).max / (4 * self.heads)
        exact = exact.clamp(-limit, limit)
        mean = cast_clamped(exact.mean(2), self.stored)
        # From the stored mean, so that its rounding adds no error.
        differences = mean.to(exact.dtype)[:, :, None] - exact
        columns = {"mean": mean, **self._differences.encode(differences, positions)}
        return {name: column[:, None] for name, column in columns.items()}

    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        own = {name: columns[name][:, 0].movedim(2, 1).contiguous() for name in self._differences.columns}
        exact = compute_dtype(self.dtype)
        differences = self._differences.decode_in_basis(own, positions, exact)
        return cast_clamped(columns["mean"].to(exact) - differences, self.dtype)

    def unpacking(self) -> Unpacking | str:
        from kvpolicy_kernels.quantise.unpack import centred

        own = self._differences.unpacking()
        if isinstance(own, str):
            return own
        of_heads = (PackedColumn(self.heads * column.width, column.dtype) for column in own.columns)
        columns = PackedColumn(self.dim, self.stored), *of_heads
        return Unpacking(centred, columns, options=(*own.options, self.heads), joint=True)
