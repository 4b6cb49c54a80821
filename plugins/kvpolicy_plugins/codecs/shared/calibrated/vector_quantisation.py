"""Vector quantisation: the nearest entry of a codebook, and codebooks by k-means."""

from collections.abc import Iterator

import torch
from torch import Tensor

ITERATIONS = 25
_MOST_DISTANCES = 2**24  # computed at a time
_MOST_ON_CPU = 2**18  # which then stay in its cache


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """The index int64 [P, N] of the centroid [P, E, g] nearest to each point [P, N, g]; of equal ones the first."""
    blocks = [distances.argmin(-1) for distances in _distances(points, centroids)]
    return torch.cat(blocks, 1) if blocks else torch.zeros(points.shape[:2], dtype=torch.int64, device=points.device)


def k_means(points: Tensor, entries: int, random: torch.Generator) -> Tensor:
    """Codebooks [P, entries, g] for the points [P, N, g], N >= 1, in their dtype, by Lloyd's iteration.

    It starts from distinct points drawn at random and ends after 25 iterations, or when nothing changes. A centroid
    that is nearest to no point becomes one of those that are farthest from theirs. With no more points than entries
    every point is an entry, some of them more than once. `random` is a generator on the CPU.
    """
    count = points.shape[1]
    order = torch.stack([torch.randperm(count, generator=random) for _ in points])
    centroids = _rows(points, order[:, torch.arange(entries) % count].to(points.device))
    if count <= entries:
        return centroids
    for _ in range(ITERATIONS):
        before, centroids = centroids, _means(points, centroids)
        if torch.equal(before, centroids):
            break
    return centroids


def _means(points: Tensor, centroids: Tensor) -> Tensor:
    """One iteration: the means of the points that are nearest to each centroid."""
    problems, entries, size = centroids.shape
    found = [distances.min(-1) for distances in _distances(points, centroids)]
    least, codes = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    owners = (codes + entries * torch.arange(problems, device=codes.device)[:, None]).flatten()
    # In float64, because a GPU adds in an order of its own.
    sums = points.new_zeros(problems * entries, size, dtype=torch.float64)
    sums.index_add_(0, owners, points.flatten(0, 1).double())
    counts = owners.bincount(minlength=problems * entries).view(problems, entries, 1)
    means = (sums.view_as(centroids) / counts.clamp(min=1)).to(points.dtype)
    worst = (points.square().sum(-1) + 2 * least).argsort(dim=-1, descending=True, stable=True)
    empty = counts == 0
    rank = (empty[..., 0].cumsum(-1) - 1).clamp(min=0)
    return torch.where(empty, _rows(points, worst.gather(1, rank)), means)


def _distances(points: Tensor, centroids: Tensor) -> Iterator[Tensor]:
    """Of blocks of points, half the squared distances [P, n, E] less half the squared norms of the points.

    Not by matrix products, which round equal centroids differently, and points by how many there are.
    """
    most = _MOST_ON_CPU if points.device.type == "cpu" else _MOST_DISTANCES
    size = max(1, most // max(1, centroids.shape[0] * centroids.shape[1]))
    coordinates = centroids.mT.contiguous()[:, :, None].unbind(1)
    norms = centroids.square().sum(-1)[:, None] / 2
    for block in points.split(size, 1) if points.shape[1] else ():
        distances = norms.repeat(1, block.shape[1], 1)
        for column, coordinate in zip(block.split(1, -1), coordinates, strict=True):
            distances.addcmul_(column, coordinate, value=-1)
        yield distances


def _rows(points: Tensor, index: Tensor) -> Tensor:
    """Points [P, m, g] at the index [P, m]."""
    return points.gather(1, index[..., None].expand(*index.shape, points.shape[-1]))
