"""Nearest centroids and k-means against loops."""

import pytest
import torch
from torch.testing import assert_close

from kvpolicy_plugins.codecs.shared.calibrated.vector_quantisation import ITERATIONS, k_means, nearest


def looped(points, entries, order):
    """Lloyd's iteration for the points [N, g], from those that come first in an order."""
    centroids = points[order[:entries]].clone()
    for _ in range(ITERATIONS):
        distances = torch.tensor([[float((point - one).square().sum()) for one in centroids] for point in points])
        owners, errors = distances.argmin(1), distances.amin(1)
        farthest = iter(errors.argsort(descending=True, stable=True).tolist())
        for entry in range(entries):
            own = points[owners == entry]
            centroids[entry] = own.mean(0) if len(own) else points[next(farthest)]
    return centroids


@pytest.mark.parametrize("clustered", [False, True])
def test_k_means_is_that_of_a_loop(clustered):
    random = torch.Generator().manual_seed(3)
    points = torch.randn(2, 40, 3, generator=random, dtype=torch.float64)
    if clustered:  # of eight drawn points several are equal, so that centroids stay without any
        points = points[:, torch.arange(40).clamp(max=9)]
        points[:, 10:] = points[:, 9:10]
    found = k_means(points, 8, torch.Generator().manual_seed(5))
    drawn = torch.Generator().manual_seed(5)
    for own, centroids in zip(points, found, strict=True):
        assert_close(centroids, looped(own, 8, torch.randperm(40, generator=drawn)), atol=1e-9, rtol=1e-9)


def test_centroids_that_nobody_is_near_to_go_where_the_error_is():
    """Ninety equal points, and ten apart: with a centroid for each, nothing is lost."""
    points = torch.cat([torch.zeros(90, 1), torch.arange(1, 11)[:, None]]).float()[None]
    for seed in range(5):
        found = k_means(points, 11, torch.Generator().manual_seed(seed))
        assert sorted(found.flatten().tolist()) == list(range(11))


def test_few_points_are_all_entries():
    points = torch.arange(12).view(2, 3, 2).float()
    found = k_means(points, 8, torch.Generator().manual_seed(0))
    for own, centroids in zip(points, found, strict=True):
        assert {tuple(one) for one in centroids.tolist()} == {tuple(one) for one in own.tolist()}


def test_the_first_of_equal_centroids_is_the_nearest():
    centroids = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1)).repeat(1, 7, 1)
    points = torch.randn(3, 99, 4, generator=torch.Generator().manual_seed(2))
    found = nearest(points, centroids)
    assert torch.equal(found, torch.cdist(points, centroids[:, :5]).argmin(-1))
    assert torch.equal(nearest(points[:, :1], centroids), found[:, :1])
    assert nearest(points[:, :0], centroids).shape == (3, 0)


def test_blocks_are_put_together():
    points = torch.randn(300, 40, 2, generator=torch.Generator().manual_seed(1))
    centroids = torch.randn(300, 256, 2, generator=torch.Generator().manual_seed(2))
    assert torch.equal(nearest(points, centroids), torch.cdist(points, centroids).argmin(-1))
