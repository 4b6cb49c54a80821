"""Calibrated tensors on the device that they are needed on, and bases that are made of them."""

from typing import Self

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError

_WORST_CONDITION = 1e4  # a float32 then has three digits left when it comes back
_SIGNS = 8
_TOLERANCE = 1e-3  # rounding errors of a basis in float32, over about a thousand terms


@attrs.frozen(eq=False)
class Constant:
    """A tensor, and its copies on other devices: the calibration may be on another one than the model."""

    tensor: Tensor
    _copies: dict[torch.device, Tensor] = attrs.field(init=False, factory=dict, repr=False)

    def on(self, device: torch.device) -> Tensor:
        """The tensor on a device."""
        if device not in self._copies:
            with torch.inference_mode(mode=False):  # so that the copy can be used outside of it later
                self._copies[device] = self.tensor.to(device)
        return self._copies[device]

    def of_head(self, head: int) -> "Constant":
        """Of a tensor [K, ...] that of one head, [1, ...]."""
        return Constant(self.tensor[head : head + 1])


@attrs.frozen(eq=False)
class Basis:
    """A basis, not necessarily an orthonormal one, in which the coordinates of a row vector v are v F."""

    forward: Constant  # F, [..., D, D] in the dtype of the arithmetic
    inverse: Constant  # F⁻¹

    @classmethod
    def of(cls, forward: Tensor, dtype: torch.dtype) -> Self:
        """The basis of F; inverted in float64, so that the inverse is as exact as `dtype` allows."""
        exact = forward.double()
        return cls(Constant(exact.to(dtype)), Constant(torch.linalg.inv(exact).to(dtype)))

    def to(self, vectors: Tensor) -> Tensor:
        """Coordinates [..., n, D] of vectors [..., n, D]."""
        return vectors @ self.forward.on(vectors.device).to(vectors.dtype)

    def dual(self, queries: Tensor) -> Tensor:
        """Queries in the dual basis: their products with coordinates are those with vectors."""
        return queries @ self.inverse.on(queries.device).to(queries.dtype).mT

    def back(self, coordinates: Tensor) -> Tensor:
        """Vectors [..., n, D] of coordinates [..., n, D]."""
        return coordinates @ self.inverse.on(coordinates.device).to(coordinates.dtype)

    def of_head(self, head: int) -> "Basis":
        """That of one head, where F is [K, D, D]."""
        return Basis(self.forward.of_head(head), self.inverse.of_head(head))


def check_invertible(name: str, forward: Tensor) -> None:
    """Raise ParameterError unless each F [..., D, D] is so far from singular that float32 can come back from it."""
    sizes = torch.linalg.svdvals(forward.double())
    if not bool((sizes[..., -1] * _WORST_CONDITION >= sizes[..., 0]).all() and (sizes[..., -1] > 0).all()):
        raise ParameterError(
            f"{name} must be invertible: the ratio of its singular values is above {_WORST_CONDITION:g}"
        )


def check_orthonormal(name: str, basis: Tensor) -> None:
    """Raise ParameterError unless the columns of U [n, r] are orthonormal, tested with eight vectors of random signs.

    A changed column changes all of these products, whose cost is that of eight tokens.
    """
    random = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (basis.shape[1], _SIGNS), generator=random).mul(2).sub(1).double().to(basis.device)
    exact = basis.double()
    worst = float((exact.T @ (exact @ signs) - signs).abs().max())
    if not worst <= _TOLERANCE:
        raise ParameterError(f"{name} must have orthonormal columns: they are off by {worst:.2g}")
