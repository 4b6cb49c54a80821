"""Rotary position embedding and its inverse, for stores that keep keys before rotation."""

import attrs
import torch
from torch import Tensor


@attrs.frozen(eq=False)
class Rotary:
    """The rotary embedding of a model: dimension i is paired with i + R/2 among the first R (`rotate_half`).

    Orthogonal up to `scaling`, the factor of YaRN-like embeddings on cosine and sine.
    """

    frequencies: Tensor  # [R/2] float32, radians per position
    scaling: float = 1.0

    def rotate(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Vectors [..., D] rotated to integer positions [...]."""
        return self._rotated(vectors, positions, 1.0, self.scaling)

    def unrotate(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotate`: vectors [..., D] at positions [...] before rotation."""
        return self._rotated(vectors, positions, -1.0, 1.0 / self.scaling)

    def _rotated(self, vectors: Tensor, positions: Tensor, sign: float, factor: float) -> Tensor:
        pairs = self.frequencies.shape[0]
        angles = positions[..., None].to(self.frequencies.dtype) * self.frequencies.to(vectors.device)
        cos, sin = (angles.cos() * factor).to(vectors.dtype), (angles.sin() * sign * factor).to(vectors.dtype)
        first, second, rest = vectors[..., :pairs], vectors[..., pairs : 2 * pairs], vectors[..., 2 * pairs :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
