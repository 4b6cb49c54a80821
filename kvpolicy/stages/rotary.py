"""Rotary position embedding, applied and undone: for stores that hold keys as they were before it."""

import attrs
import torch
from torch import Tensor


@attrs.frozen(eq=False)
class Rotary:
    """The rotation of one model: dimension i is paired with i + R/2 among the first R (`rotate_half`).

    Rotation is orthogonal up to `scaling`, which YaRN-like embeddings multiply cosine and sine with.
    """

    frequencies: Tensor  # [R/2] float32, radians per position
    scaling: float = 1.0

    def rotate(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Vectors [..., D] as they are at integer positions [...]."""
        return self._turned(vectors, positions, 1.0, self.scaling)

    def unrotate(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Vectors [..., D] that `rotate` turned, as they were before."""
        return self._turned(vectors, positions, -1.0, 1.0 / self.scaling)

    def _turned(self, vectors: Tensor, positions: Tensor, sense: float, factor: float) -> Tensor:
        half = self.frequencies.shape[0]
        angles = positions[..., None].to(self.frequencies.dtype) * self.frequencies.to(vectors.device)
        cos, sin = (angles.cos() * factor).to(vectors.dtype), (angles.sin() * sense * factor).to(vectors.dtype)
        first, second, rest = vectors[..., :half], vectors[..., half : 2 * half], vectors[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
