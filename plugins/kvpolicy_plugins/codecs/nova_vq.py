"""Codec `nova_vq`: keys by codebooks in the metric of queries, values in a calibrated rotation."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Choice, Codec, Flag, Formats, Geometry, Integer, Number, Sample, Site, parameter
from kvpolicy_plugins.codecs.shared.affine import SCALES, compute_dtype, scale_dtype
from kvpolicy_plugins.codecs.shared.calibrated.basis import Basis, Constant, check_invertible, check_orthonormal
from kvpolicy_plugins.codecs.shared.calibrated.query_statistics import (
    centred_keys,
    key_means,
    query_moments,
    value_rotation,
)
from kvpolicy_plugins.codecs.shared.calibrated.query_weighted_keys import (
    QueryWeightedKeys,
    fitted_basis,
    fitted_centroids,
    rounded_to_float8,
)
from kvpolicy_plugins.codecs.shared.min_max_values import MinMaxValues
from kvpolicy_plugins.shared.limits import SEED

_MOST_BITS = 8  # of the number of a centroid
_MOST_SINKS = 1024  # each takes D numbers of the calibration; the authors keep 64 tokens as they are


@attrs.frozen
class NovaVQ(Codec):
    """Keys as centroids in a basis of their own, values in 2 bits after a rotation, both calibrated (NOVA-KV).

    1. Keys: with Sq, the sum of E[q q'] over the query heads of a KV head, and U the eigenvectors of
       Sq^(1/2) Ck Sq^(1/2), r = (k - mu) Sq^(1/2) U. A squared error of r is the expected squared error of logits.
    2. r is divided by its root mean square, and of every `group` coordinates, which are spread over the eigenvalues,
       the number of the nearest centroid is stored: a codebook of each head and group, by k-means (25 iterations).
    3. Values: rotated by R H, with R the eigenvectors of E[w v v'], w = k' Sq k, and the Hadamard matrix H. Magnitudes
       are limited to that of rank `value_clip` of the token, then they are coded between minimum and maximum.

    Attention takes queries to the basis of 1 and outputs back from that of 3; entries are never taken back.

    Where this differs from the authors:
    - they keep the first 64 tokens as they are. Here a mean mu of their own serves the keys of the first `sinks`
      positions: those of an attention sink are far from all others, and much alike in all texts.
    - eigenvalues of Sq count as a millionth of the largest at least; theirs, as 1e-30.
    - codebooks are fitted to at most 4096 tokens rather than to every fourth.
    - the code of a key follows from its scale as it is stored, in float16.
    - they permute the coordinates of values after R H, which changes nothing where a value has one scale.
    """

    name: ClassVar[str] = "nova_vq"
    reference: ClassVar[str] = "arXiv:2608.04074"
    calibrated_by: ClassVar[tuple[str, ...]] = ("bits", "group", "normalise", "sinks", "value_rotation", "seed")

    bits: int = parameter(Integer(minimum=1, maximum=_MOST_BITS), 2, help="bits per coordinate of a key")
    group: int = parameter(
        Integer(minimum=1, maximum=_MOST_BITS), 4, help="coordinates of a centroid; with `bits` of each, 8 bits at most"
    )
    normalise: bool = parameter(Flag(), True, help="whether coordinates are relative to their root mean square")
    centroids: str = parameter(Choice(("float8", "full")), "float8", help="centroids in float8 (e5m2), or as fitted")
    sinks: int = parameter(
        Integer(minimum=0, maximum=_MOST_SINKS), 4, help="how many of the first positions have a mean of their own"
    )
    value_bits: int = parameter(Choice((2, 3, 4, 8)), 2, help="bits per number of a value")
    value_rotation: bool = parameter(Flag(), True, help="whether values are rotated; D is then a power of two")
    value_clip: float = parameter(
        Number(above=0, maximum=1), 0.92, help="rank of the largest magnitude of a value, as a share of D; 1 = no limit"
    )
    seed: int = parameter(SEED, 0, help="seed of the tokens that k-means starts from")
    scales: str = parameter(SCALES, "half", help="scales and minima in float16, or in the model's own precision")
    residual: int = parameter(Integer(minimum=0), 256, help="how many of the newest entries are not packed")
    batch: int = parameter(Integer(minimum=1), 16, help="how many entries are packed at a time; 1 = each as it comes")

    def __attrs_post_init__(self) -> None:
        if self.bits * self.group > _MOST_BITS:
            most = _MOST_BITS // self.bits
            raise ParameterError(f"group: must be at most {most}, because a centroid has 8 bits: {self.group}")

    @property
    def calibrated(self) -> bool:
        return True

    def calibrate(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """Per layer `forward`, `means`, `centroids` and, where values are rotated, `rotation`.

        In float32, or the dtype of the keys if wider; the shapes are those of `_expected`.
        """
        return [self._fitted(sample) for sample in samples]

    def check_calibration(self, site: Site) -> None:
        super().check_calibration(site)
        found = self._checked(site)
        check_invertible("forward", found["forward"])
        if "rotation" in found:
            check_orthonormal("rotation", found["rotation"])

    def formats(self, site: Site) -> Formats:
        found, exact, dim = self._checked(site), compute_dtype(site.dtype), site.geometry.head_dim
        centroids = rounded_to_float8(found["centroids"]) if self.centroids == "float8" else found["centroids"]
        fitted = Basis.of(found["forward"], exact), Constant(found["means"].to(exact)), Constant(centroids.to(exact))
        dtypes, places = (site.dtype, scale_dtype(self.scales, site.dtype)), (self.residual, self.batch)
        keys = QueryWeightedKeys(*fitted, self.bits * self.group, *dtypes, self.normalise, *places)
        rank = math.floor(self.value_clip * dim + 1e-6)
        clip = None if rank >= dim - 1 else rank
        rotation = Basis.of(found["rotation"], exact) if self.value_rotation else None
        return Formats(keys, MinMaxValues(dim, *dtypes, self.value_bits, *places, clip, rotation))

    def _fitted(self, sample: Sample) -> dict[str, Tensor]:
        self._expected(sample.geometry)  # refuses what has no rotation
        moments, means = query_moments(sample), key_means(sample, self.sinks)
        dtype = torch.promote_types(sample.keys.dtype, torch.float32)
        forward, coordinates = fitted_basis(moments, centred_keys(sample, means), self.group, normalise=self.normalise)
        fitted = {"forward": forward, "means": means}
        fitted["centroids"] = fitted_centroids(coordinates.to(dtype), self.bits, self.group, self.seed)
        if self.value_rotation:
            fitted["rotation"] = value_rotation(sample, moments)
        return {name: tensor.to(dtype).contiguous() for name, tensor in fitted.items()}

    def _expected(self, geometry: Geometry) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the calibrated tensors."""
        heads, dim = geometry.kv_heads, geometry.head_dim
        if self.value_rotation and dim.bit_count() != 1:
            raise ParameterError(f"value_rotation: must be false for a head dimension that is no power of two: {dim}")
        codebooks = heads, -(-dim // self.group), 2 ** (self.bits * self.group), self.group
        expected = {"forward": (heads, dim, dim), "means": (heads, self.sinks + 1, dim), "centroids": codebooks}
        return expected | ({"rotation": (dim, dim)} if self.value_rotation else {})

    def _checked(self, site: Site) -> Mapping[str, Tensor]:
        """The calibrated tensors by name."""
        expected = self._expected(site.geometry)
        for name, shape in expected.items():
            tensor = site.calibration.get(name)
            if tensor is None:
                raise ParameterError(
                    f"nova_vq: must come with a calibration of layer {site.layer}: {name!r} is missing"
                )
            if tuple(tensor.shape) != shape:
                raise ParameterError(f"nova_vq: {name!r} must be {list(shape)} for this model: {list(tensor.shape)}")
        return {name: site.calibration[name] for name in expected}
