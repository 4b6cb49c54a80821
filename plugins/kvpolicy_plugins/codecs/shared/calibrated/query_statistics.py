"""Second moments of queries, keys and values, and the bases that they give (NOVA-KV)."""

import math

import torch
from torch import Tensor

from kvpolicy.stages import Sample
from kvpolicy_plugins.codecs.shared.calibrated.eigenvectors import descending_eigenvectors
from kvpolicy_plugins.codecs.shared.hadamard import hadamard

_LEAST_EIGENVALUE = 1e-6  # relative to the largest: fewer queries than dimensions leave directions without any


def query_moments(sample: Sample) -> Tensor:
    """Per KV head the sum over its query heads of E[q q'], float64 [K, D, D], not centred."""
    heads, dim = sample.keys.shape[1], sample.keys.shape[3]
    moments = torch.zeros(heads, dim, dim, dtype=torch.float64, device=sample.queries.device)
    for sequence in sample.queries:  # one at a time, to limit memory in float64
        rows = sequence.double().unflatten(0, (heads, -1)).flatten(1, 2)
        moments += rows.mT @ rows
    return moments / (sample.queries.shape[0] * sample.queries.shape[2])


def key_means(sample: Sample, first: int) -> Tensor:
    """Means of the keys at each of the `first` positions, and at all others, float64 [K, P + 1, D].

    At positions that no sequence has, that of all others; that of all, where there are no others.
    """
    keys = sample.keys.double()
    rest = keys[:, :, first:] if keys.shape[2] > first else keys
    mean = rest.mean((0, 2))[:, None]
    own = keys[:, :, :first].mean(0)
    return torch.cat([own, mean.expand(-1, first + 1 - own.shape[1], -1)], 1)


def centred_keys(sample: Sample, means: Tensor) -> Tensor:
    """Keys less the mean at their position, float64 [K, S · T, D]."""
    index = torch.arange(sample.keys.shape[2], device=means.device).clamp(max=means.shape[1] - 1)
    centred: Tensor = sample.keys.double() - means[:, index]
    return centred.movedim(1, 0).flatten(1, 2)


def query_weighted_basis(query_moments: Tensor, key_covariance: Tensor) -> Tensor:
    """F, float64 [..., D, D], with |x F|² = x Sq x', in which the covariance of keys is diagonal, descending.

    F = Sq^(1/2) U, U the eigenvectors of Sq^(1/2) Ck Sq^(1/2). Eigenvalues of Sq count as at least a millionth of the
    largest, so that F has an inverse; without any queries Sq is the identity.
    """
    sizes, directions = torch.linalg.eigh(query_moments.double())
    largest = sizes[..., -1:]
    sizes = torch.where(largest > 0, sizes.maximum(largest * _LEAST_EIGENVALUE), 1.0)
    root: Tensor = (directions * sizes.sqrt()[..., None, :]) @ directions.mT
    return root @ _directions(root @ key_covariance.double() @ root)


def value_rotation(sample: Sample, query_moments: Tensor) -> Tensor:
    """R H, float64 [D, D], orthonormal: R the eigenvectors of E[w v v'], H the Hadamard matrix; D a power of two.

    The weight of a token is k' Sq k, relative to its mean over the tokens of the head; E is over tokens and heads.
    """
    heads, dim = sample.keys.shape[1], sample.keys.shape[3]
    keys, values = (states.movedim(1, 0).flatten(1, 2).double() for states in (sample.keys, sample.values))
    weights = ((keys @ query_moments) * keys).sum(-1, keepdim=True)
    weights = weights / weights.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    moments = (values.mT @ (values * weights)).sum(0) / (heads * values.shape[1])
    rotation: Tensor = hadamard(_directions(moments)) / math.sqrt(dim)
    return rotation


def stratified(dim: int, group: int) -> Tensor:
    """The order [D] in which the coordinate of rank i is in group i mod ceil(D / g), for equal volumes of groups.

    It is cut every g coordinates; where g does not divide D, the last groups mix coordinates of two.
    """
    groups = -(-dim // group)
    return torch.cat([torch.arange(first, dim, groups) for first in range(groups)])


def _directions(moments: Tensor) -> Tensor:
    """Eigenvectors (columns) of [..., n, n], symmetric up to rounding, by descending eigenvalue."""
    return descending_eigenvectors((moments + moments.mT) / 2)[1]
