"""Scenes whose keys resemble each other, and the similarities that should be forgiven in them."""

import torch

from kvpolicy_kernels import Column, Segments
from kvpolicy_kernels.score.redundancy.forgiven_similarity import forgiven_similarity
from tests.kernels.accuracy import assert_twice_as_good
from tests.kernels.outputs import Guarded
from tests.kernels.references import redundancy as reference
from tests.kernels.scenes import DEVICE, Scene, scene

KINDS = ("isotropic", "clustered", "duplicates", "shared mean")


def keys_of(kind: str, lengths: torch.Tensor, dim: int, dtype: torch.dtype, seed: int, capacity=None) -> Scene:
    """A scene whose keys resemble each other in one of several ways."""
    found = scene(lengths, dim, dtype, capacity=capacity, seed=seed)
    random = torch.Generator().manual_seed(seed + 1)
    for keys in found.lists("keys"):
        keys.copy_(resembling(kind, keys.shape[0], dim, random).to(dtype))
    return found


def resembling(kind: str, count: int, dim: int, random: torch.Generator) -> torch.Tensor:
    noise = torch.randn(count, dim, generator=random)
    if kind == "isotropic":
        return noise
    if kind == "shared mean":
        return noise + 1.5 * torch.randn(dim, generator=random)
    centres = torch.randn(5, dim, generator=random) * torch.rand(5, 1, generator=random) * 3
    members = centres[torch.randint(0, 5, (count,), generator=random)]
    return members + (0.5 * noise if kind == "clustered" else 0.0 * noise)


def expected(found: Scene, threshold: float, forgive: int, end: str, empty_row: str):
    """Exact result and same-dtype torch's, [P, T]."""
    shape = (found.segments.count, found.segments.longest)
    exact, same = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape)
    for row, keys in enumerate(found.lists("keys")):
        pairs = reference.similarities(keys.cpu().double())
        chosen = reference.targets(pairs, threshold, forgive, end)
        exact[row, : len(keys)] = reference.forgiven_similarity(pairs, chosen, empty_row)
        same[row, : len(keys)] = reference.forgiven_similarity(reference.similarities(keys.cpu()), chosen, empty_row)
    return exact, same


def threshold_for(found: Scene, near: float = 0.5) -> float:
    pairs = [reference.similarities(keys.cpu().double()).flatten() for keys in found.lists("keys")]
    return reference.between(torch.cat(pairs), near)


def check(found: Scene, *, near=0.5, forgive=1, end="last", empty_row="slot0") -> torch.Tensor:
    threshold = threshold_for(found, near)
    exact, same = expected(found, threshold, forgive, end, empty_row)
    segments, keys = place(found)
    out = Guarded((segments.count, segments.longest), torch.float32, DEVICE)
    given_back = forgiven_similarity(
        segments, keys, threshold=threshold, forgive=forgive, end=end, empty_row=empty_row, out=out.tensor
    )
    out.check()
    assert given_back is out.tensor
    assert_twice_as_good(out.tensor.cpu(), same, exact)
    return out.tensor


def place(found: Scene) -> tuple[Segments, Column]:
    return found.segments, found.columns["keys"]
