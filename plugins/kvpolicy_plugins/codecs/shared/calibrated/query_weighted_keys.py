"""Keys as entries of codebooks, in a basis where squared errors are those of logits (NOVA-KV)."""

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Column, Format
from kvpolicy_plugins.codecs.shared.affine import cast_clamped
from kvpolicy_plugins.codecs.shared.calibrated.basis import Basis, Constant
from kvpolicy_plugins.codecs.shared.calibrated.query_statistics import query_weighted_basis, stratified
from kvpolicy_plugins.codecs.shared.calibrated.vector_quantisation import k_means, nearest
from kvpolicy_plugins.codecs.shared.packing import pack, packed_size, unpack

_MOST_KEYS = 4096  # sixteen for each of 256 centroids
_E5M2 = torch.float8_e5m2


@attrs.frozen(eq=False)
class QueryWeightedKeys(Format):
    """Per group of coordinates of (k - mu) F / s the nearest centroid, and the root mean square s of the coordinates.

    F and the centroids are those of the KV head, mu that of the head and, at the first positions, of the position.
    Where there is no scale, s is 1. Key and mean are equal: s is 0, and the decoded key is the mean.
    """

    basis: Basis  # F, [K, D, D]: neighbouring coordinates are a group
    means: Constant  # mu, [K, P + 1, D]: of each of the first P positions, and of all others
    centroids: Constant  # [K, groups, entries, g]; where g does not divide D, the last of the last group do not count
    bits: int  # of the number of a centroid, entries = 2^bits
    dtype: torch.dtype  # of the model's keys
    stored: torch.dtype  # of scales
    scaled: bool = True  # whether there is a scale
    residual_length: int = 0
    step: int = 1
    columns: Mapping[str, Column] = attrs.field(init=False)
    _heads: dict[int, "QueryWeightedKeys"] = attrs.field(init=False, factory=dict, repr=False)

    @columns.default
    def _columns(self) -> dict[str, Column]:
        codes = {"codes": Column((packed_size(self.centroids.tensor.shape[1], self.bits),), torch.uint8)}
        return codes | ({"scale": Column((), self.stored)} if self.scaled else {})

    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:
        means = self._means(positions)
        # Within this limit neither a square nor a decoded number is infinite.
        limit = torch.finfo(means.dtype).max ** 0.25
        coordinates = self.basis.to((vectors.to(means.dtype) - means).clamp(-limit, limit))
        columns = {}
        if self.scaled:
            columns["scale"] = cast_clamped(coordinates.square().mean(-1).sqrt(), self.stored)
            scale = columns["scale"].to(coordinates.dtype)[..., None]  # the rounded one, by which it is decoded
            coordinates = coordinates / scale.masked_fill(scale == 0, torch.inf)
        return {"codes": pack(self._nearest(coordinates), self.bits), **columns}

    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        means = self._means(positions)
        return cast_clamped(self.basis.back(self._coordinates(columns, means.dtype)) + means, self.dtype)

    def to_basis(self, vectors: Tensor) -> Tensor:
        return self.basis.to(vectors)

    def queries_to_basis(self, queries: Tensor) -> Tensor:
        return self.basis.dual(queries)

    def from_basis(self, vectors: Tensor) -> Tensor:
        return self.basis.back(vectors)

    def decode_in_basis(self, columns: Mapping[str, Tensor], positions: Tensor, dtype: torch.dtype) -> Tensor:
        return self._coordinates(columns, dtype) + self.basis.to(self._means(positions).to(dtype))

    def of_head(self, head: int) -> Format:
        if head not in self._heads:
            means, centroids = self.means.of_head(head), self.centroids.of_head(head)
            self._heads[head] = attrs.evolve(self, basis=self.basis.of_head(head), means=means, centroids=centroids)
        return self._heads[head]

    def _means(self, positions: Tensor) -> Tensor:
        """Mu of entries at positions [B, K, n]: [B, K, n, D]."""
        means = self.means.on(positions.device)
        heads = torch.arange(means.shape[0], device=positions.device)[:, None]
        return means[heads, positions.clamp(0, means.shape[1] - 1)]

    def _nearest(self, coordinates: Tensor) -> Tensor:
        """Numbers of centroids, uint8 [B, K, n, groups], for coordinates [B, K, n, D]."""
        centroids = self.centroids.on(coordinates.device)
        heads, groups, _, size = centroids.shape
        padded = torch.nn.functional.pad(coordinates, (0, groups * size - coordinates.shape[-1]))
        points = padded.unflatten(-1, (groups, size)).movedim((1, 3), (0, 1))
        codes = nearest(points.flatten(2, 3).flatten(0, 1), centroids.flatten(0, 1))
        return codes.view(heads, groups, *points.shape[2:4]).movedim((0, 1), (1, 3)).to(torch.uint8)

    def _coordinates(self, columns: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """What is decoded of (k - mu) F, [B, K, n, D]."""
        centroids = self.centroids.on(columns["codes"].device)
        heads, groups, entries, size = centroids.shape
        first = torch.arange(heads * groups, device=centroids.device).view(heads, 1, groups) * entries
        rows = (unpack(columns["codes"], self.bits, groups) + first).flatten()
        found = centroids.to(dtype).flatten(0, 2).index_select(0, rows)
        found = found.view(*columns["codes"].shape[:3], groups * size)[..., : self.means.tensor.shape[-1]]
        return found * columns["scale"].to(dtype)[..., None] if self.scaled else found


def fitted_basis(moments: Tensor, centred: Tensor, group: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
    """F [K, D, D] for moments of queries [K, D, D] and keys less their means [K, N, D], in float64.

    With it, what codebooks are fitted to: the coordinates of at most 4096 keys of each head, [K, n, D].
    """
    covariance = centred.mT @ centred / centred.shape[1]
    forward = query_weighted_basis(moments, covariance)[..., stratified(centred.shape[2], group)]
    coordinates = centred[:, :: -(-centred.shape[1] // _MOST_KEYS)] @ forward
    scale = coordinates.square().mean(-1, keepdim=True).sqrt()
    return forward, coordinates / scale.masked_fill(scale == 0, 1) if normalise else coordinates


def fitted_centroids(coordinates: Tensor, bits: int, group: int, seed: int) -> Tensor:
    """Codebooks [K, groups, 2^(bits · group), group] for coordinates [K, N, D]; where D ends a group early, with 0."""
    random = torch.Generator().manual_seed(seed)
    every = torch.arange(2 ** (bits * group), device=coordinates.device)
    books = []
    for cut in coordinates.split(group, -1):
        book = k_means(cut.contiguous(), 2 ** (bits * cut.shape[-1]), random)
        # That of a shorter last group is repeated: of equal centroids the first is taken.
        books.append(torch.nn.functional.pad(book[:, every % book.shape[1]], (0, group - cut.shape[-1])))
    return torch.stack(books, 1)


def rounded_to_float8(centroids: Tensor) -> Tensor:
    """Centroids [K, groups, entries, g] as float8 (e5m2) with a scale per group, in their own dtype."""
    scale = centroids.abs().amax((-1, -2), keepdim=True) / torch.finfo(_E5M2).max
    return (centroids / scale.masked_fill(scale == 0, 1)).to(_E5M2).to(centroids.dtype) * scale
