"""Eigenvectors in an order and with signs that do not depend on who computes them."""

import torch
from torch import Tensor


def descending_eigenvectors(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., n], descending, and eigenvectors (columns) of [..., n, n], of which the lower half is read.

    The component of an eigenvector that is largest in magnitude is positive.
    """
    values, vectors = torch.linalg.eigh(symmetric)
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return values.flip(-1), (vectors * largest.sign()).flip(-1)
