"""Random rotations that take little to compute: signs, then the Hadamard matrix."""

import functools

import torch
from torch import Tensor

from kvpolicy.errors import ParameterError

_BLOCK = 64  # up to this size a matrix product is as fast as further halving on a CPU; elsewhere launches cost more


def random_signs(name: str, dim: int, seed: int) -> tuple[int, ...]:
    """[D], each 1 or -1.

    Raises:
        ParameterError: there is no Hadamard matrix of size `dim`, which the codec `name` needs.
    """
    if dim.bit_count() != 1:
        raise ParameterError(f"{name}: must have a head dimension that is a power of two: {dim}")
    random = torch.Generator().manual_seed(seed)
    return tuple((2 * torch.randint(2, (dim,), generator=random) - 1).tolist())


def hadamard(vectors: Tensor) -> Tensor:
    """Vectors [..., D] times Sylvester's matrix of 1 and -1; D a power of two. Twice gives D times the vectors."""
    dim = vectors.shape[-1]
    width = min(dim, _BLOCK) if vectors.device.type == "cpu" else dim
    matrix = _sylvester(width, vectors.dtype, vectors.device)
    product: Tensor = (vectors.unflatten(-1, (dim // width, width)) @ matrix).flatten(-2)
    while width < dim:
        first, second = product.unflatten(-1, (dim // width // 2, 2, width)).unbind(-2)
        product = torch.stack([first + second, first - second], -2).flatten(-3)
        width *= 2
    return product


# Cached per device: a transfer per token would take longer than the computation. It is made outside inference mode, so
# that it can be used outside of it later.
@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def _sylvester(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[D, D] of 1 and -1, symmetric; its square is D times the identity."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while matrix.shape[0] < dim:
        matrix = torch.kron(matrix.new_tensor([[1, 1], [1, -1]]), matrix)
    return matrix
