"""Codec `latent`: keys in a low-rank basis shared by all heads of a layer."""

from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Codec, Formats, Integer, Number, Sample, Site, parameter
from kvpolicy_plugins.codecs.shared.affine import BITS, SCALES, check_divides, scale_dtype
from kvpolicy_plugins.codecs.shared.calibrated.basis import check_orthonormal
from kvpolicy_plugins.codecs.shared.calibrated.eigenvectors import descending_eigenvectors
from kvpolicy_plugins.codecs.shared.calibrated.known_rotary import known
from kvpolicy_plugins.codecs.shared.calibrated.latent_keys import LatentKeys
from kvpolicy_plugins.codecs.shared.per_token import PerToken
from kvpolicy_plugins.shared.limits import MOST_CHANNELS


@attrs.frozen
class Latent(Codec):
    """Keys in a low-rank basis found before rotation, values quantised, as in SALS.

    1. Calibration: the eigenvectors U of KᵀK, where a row of K is one token's keys of all heads, not rotated;
    2. of a key k the latent Uᵀ k is stored, in the model's dtype: r numbers for all heads of an entry together;
    3. a decoded key is U Uᵀ k, rotated to the position of its entry;
    4. values are quantised in groups along the head dimension, each entry separately.

    Rotation is undone before steps 1 and 2, because it spreads the variance of keys over more dimensions.
    """

    name: ClassVar[str] = "latent"
    reference: ClassVar[str] = "arXiv:2510.24273"
    calibrated_by: ClassVar[tuple[str, ...]] = ("rank",)

    rank: float = parameter(Number(above=0, maximum=1), 0.25, help="size of a latent, as a share of all heads' keys")
    value_bits: int = parameter(BITS, 4, help="bits per number of a value")
    value_group: int = parameter(
        Integer(minimum=1, maximum=MOST_CHANNELS), 32, help="channels of a value that share a scale"
    )
    scales: str = parameter(SCALES, "half", help="scales and minima in float16, or in the model's own precision")
    residual: int = parameter(Integer(minimum=0), 0, help="how many of the newest entries are not packed")
    batch: int = parameter(Integer(minimum=1), 16, help="how many entries are packed at a time; 1 = each as it comes")

    @property
    def joint(self) -> bool:
        return True

    @property
    def calibrated(self) -> bool:
        return True

    def calibrate(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """Per layer `basis` [K·D, r], in float32 or that of the keys if wider, and `energy` [], the share it keeps."""
        return [self._fitted(sample) for sample in samples]

    def check_calibration(self, site: Site) -> None:
        super().check_calibration(site)
        if (basis := site.calibration.get("basis")) is not None:  # `formats` reports a missing basis
            check_orthonormal("basis", self._checked(basis, site))

    def formats(self, site: Site) -> Formats:
        rotary, heads = known(site.rotary, "latent"), site.geometry.kv_heads
        basis = self._checked(site.calibration.get("basis"), site)
        arithmetic = torch.promote_types(site.dtype, torch.float32)
        keys = LatentKeys(rotary, basis.to(arithmetic), heads, site.dtype, self.residual, self.batch)
        return Formats(keys, self._values(site))

    def _values(self, site: Site) -> PerToken:
        check_divides("value_group", self.value_group, site.geometry.head_dim)
        stored = scale_dtype(self.scales, site.dtype)
        dim = site.geometry.head_dim
        return PerToken(dim, site.dtype, stored, self.value_bits, self.value_group, self.residual, self.batch)

    def _fitted(self, sample: Sample) -> dict[str, Tensor]:
        eigenvalues, vectors = joint_spectrum(sample)
        kept = self._rank(len(eigenvalues))
        energy = eigenvalues[:kept].sum() / eigenvalues.sum().clamp(min=torch.finfo(torch.float64).tiny)
        dtype = torch.promote_types(sample.keys.dtype, torch.float32)
        return {"basis": vectors[:, :kept].to(dtype).contiguous(), "energy": energy.to(dtype)}

    def _rank(self, width: int) -> int:
        """The width of a latent, r of K·D."""
        return max(1, round(self.rank * width))

    def _checked(self, basis: Tensor | None, site: Site) -> Tensor:
        """The first r columns of the calibrated basis."""
        width = site.geometry.kv_heads * site.geometry.head_dim
        rank = self._rank(width)
        if basis is None:
            raise ParameterError(f"rank: must come with a calibration of layer {site.layer} (a basis): none is given")
        if basis.ndim != 2 or basis.shape[0] != width or basis.shape[1] < rank:
            expected = f"[{width}, {rank}] or wider"
            raise ParameterError(
                f"rank: must come with a basis of shape {expected} for this model: {list(basis.shape)}"
            )
        return basis[:, :rank]


def joint_spectrum(sample: Sample) -> tuple[Tensor, Tensor]:
    """Eigenvalues [K·D], descending, and eigenvectors (columns) of KᵀK in float64, K [S·T, K·D] before rotation.

    Not centred. The component of an eigenvector that is largest in magnitude is positive.
    """
    rotary, positions = known(sample.rotary, "latent"), torch.arange(sample.keys.shape[2], device=sample.keys.device)
    width = sample.keys.shape[1] * sample.keys.shape[3]
    products = torch.zeros(width, width, dtype=torch.float64, device=sample.keys.device)
    for sequence in sample.keys:  # one at a time, to limit memory in float64
        rows = rotary.unrotate(sequence.double(), positions).transpose(0, 1).flatten(1)
        products += rows.T @ rows
    eigenvalues, vectors = descending_eigenvectors(products)
    return eigenvalues.clamp(min=0), vectors
