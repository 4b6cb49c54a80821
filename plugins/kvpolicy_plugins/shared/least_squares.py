"""Least squares that stay near what is known, batched, for systems of any shape and rank."""

import torch
from torch import Tensor

_LEAST = 1e-12  # penalty relative to the square of the largest singular value: so that every system has a solution
_TINY = 1e-30  # so that a matrix of zeros divides nothing by zero


def ridge_towards(matrix: Tensor, target: Tensor, prior: Tensor, ridge: float, square: Tensor) -> Tensor:
    """The X [..., t, d] that minimises |A X - target|² + ridge · |A|² · |X - prior|², all float64.

    For `ridge` 0 the least squares solution, and where there are many the nearest to `prior`.

    Args:
        matrix: A [..., n, t]; a row or a column of zeros counts for nothing.
        target: [..., n, d].
        prior: [..., t, d].
        ridge: relative to |A|².
        square: [...], |A|², the square of the largest singular value.
    """
    residual = target - matrix @ prior
    rows, columns = matrix.shape[-2:]
    transposed = matrix.mT
    gram = matrix @ transposed if rows < columns else transposed @ matrix
    penalty = ((ridge + _LEAST) * square).clamp(min=_TINY)[..., None, None]
    gram = gram + penalty * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky_ex(gram).L
    if rows < columns:
        return prior + transposed @ torch.cholesky_solve(residual, factor)
    return prior + torch.cholesky_solve(transposed @ residual, factor)


def square_norm(matrix: Tensor, start: Tensor | None = None, iterations: int = 3) -> Tensor:
    """[...], the square of the largest singular value of [..., n, t] by power iteration; exact only from below.

    `start` [..., t] is by default ones, which no matrix without negative numbers has a first singular vector at right
    angles to.
    """
    vector = torch.ones_like(matrix[..., 0, :]) if start is None else start
    vector = vector[..., None]
    for _ in range(iterations):
        vector = matrix.mT @ (matrix @ _unit(vector))
    return (matrix @ _unit(vector)).square().sum((-2, -1))


def _unit(vectors: Tensor) -> Tensor:
    length: Tensor = vectors.norm(dim=-2, keepdim=True)
    return vectors / length.clamp(min=_TINY)


def within_bounds(
    matrix: Tensor, target: Tensor, found: Tensor, bounds: tuple[float, float], square: Tensor, iterations: int
) -> Tensor:
    """Approximate minimiser of |A x - target|² within bounds: `found` [..., t] clamped, then projected gradient steps.

    `square` [...] is the square of the largest singular value of A [..., n, t], or an estimate.
    """
    solution = found.clamp(*bounds)
    step = 1 / square.clamp(min=_TINY)[..., None]
    for _ in range(iterations):
        wrong = (matrix @ solution[..., None])[..., 0] - target
        solution = (solution - step * (matrix.mT @ wrong[..., None])[..., 0]).clamp(*bounds)
    return solution
