"""Keys in a low-rank basis that all heads of a layer share (SALS)."""

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Column, Format, Rotary
from kvpolicy_plugins.codecs.shared.affine import cast_clamped
from kvpolicy_plugins.codecs.shared.calibrated.basis import Constant


@attrs.frozen(eq=False)
class LatentKeys(Format):
    """Latent keys of SALS: k̃ = Uᵀ k per entry, with k the concatenated keys of all heads before rotation."""

    rotary: Rotary
    basis: Tensor  # U, [K·D, r] in the dtype of the arithmetic, orthonormal columns by descending eigenvalue
    heads: int  # K
    dtype: torch.dtype  # of the model's keys, and of the latents
    residual_length: int = 0
    step: int = 1
    joint: bool = True
    columns: Mapping[str, Column] = attrs.field(init=False)
    _basis: Constant = attrs.field(init=False, repr=False)

    @columns.default
    def _columns(self) -> dict[str, Column]:
        return {"latent": Column((self.rank,), self.dtype)}

    @_basis.default
    def _constant(self) -> Constant:
        return Constant(self.basis)

    @property
    def rank(self) -> int:
        """The width r of a latent."""
        return self.basis.shape[1]

    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:
        plain = self.unrotate(vectors, positions).masked_fill(positions[..., None] < 0, 0.0)
        return {"latent": cast_clamped(self.project(plain.transpose(1, 2).flatten(2))[:, None], self.dtype)}

    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        plain = columns["latent"][:, 0].to(self.basis.dtype) @ self._basis.on(positions.device).T
        per_head = plain.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return cast_clamped(self.rotary.rotate(per_head, _common(positions)), self.dtype)

    def unrotate(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Keys or queries [..., D] at positions [...] as they were before rotation, in the dtype of the basis."""
        return self.rotary.unrotate(vectors.to(self.basis.dtype), positions)

    def project(self, vectors: Tensor) -> Tensor:
        """Latents [..., r] of concatenated vectors of all KV heads before rotation, [..., K·D]."""
        return vectors @ self._basis.on(vectors.device)


def _common(positions: Tensor) -> Tensor:
    """Positions [B, 1, n] if those of all heads are equal, to compute fewer angles; otherwise unchanged."""
    first = positions[:, :1]
    # Only compared on a CPU: elsewhere it would synchronise the device.
    alike = positions.device.type == "cpu" and torch.equal(positions, first.expand_as(positions))
    return first if alike else positions
