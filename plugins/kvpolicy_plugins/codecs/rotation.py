"""Codec `rotation`: randomly rotated vectors, quantised with one codebook."""

from collections.abc import Sequence
from typing import ClassVar

import attrs
from torch import Tensor

from kvpolicy.stages import Choice, Codec, Flag, Formats, Integer, Sample, Site, parameter
from kvpolicy_plugins.codecs.shared.affine import SCALES, scale_dtype
from kvpolicy_plugins.codecs.shared.calibrated.mean_keys import checked, measured
from kvpolicy_plugins.codecs.shared.hadamard import random_signs
from kvpolicy_plugins.codecs.shared.rotated import Rotated
from kvpolicy_plugins.shared.limits import SEED

_MOST_BITS = 6  # their error is a fortieth of a vector, that of float8 with its 8 bits too


@attrs.frozen
class Rotation(Codec):
    """A random rotation, then the best scalar codebook for normal numbers (TurboQuant, section 3.1).

    With random signs s and the Hadamard matrix H, the coordinates of √D · H (s · x) / ‖x‖ are nearly standard normal,
    for every x. There is no calibration, and only the norm is stored per vector. The second stage of the paper,
    one bit for unbiased inner products, and its mixed widths are not implemented.

    Two options are not of the paper:
    - `norm_correction`: decoded vectors have the norm that they had, which rounding to levels makes smaller;
    - `centre: calibrated`: what is rotated of a key is its difference from the mean key of its head. Keys lie around a
      mean that is not zero, so their differences from it are shorter, and so are the errors. Means are
      taken on a text: at each of the first `sinks` positions, since sinks lie elsewhere, and of all other keys before
      their rotary embedding, which is then applied to the mean (`MeanKeys`). Values have no such mean.
    """

    name: ClassVar[str] = "rotation"
    reference: ClassVar[str] = "arXiv:2504.19874"
    calibrated_by: ClassVar[tuple[str, ...]] = ("centre", "sinks")

    bits: int = parameter(Integer(minimum=1, maximum=_MOST_BITS), 4, help="bits per number")
    value_bits: int = parameter(
        Integer(minimum=0, maximum=_MOST_BITS), 0, help="bits per number of the values; 0 = as of keys"
    )
    norm_correction: bool = parameter(Flag(), False, help="whether decoded vectors have the norm of the vectors")
    centre: str = parameter(
        Choice(("none", "calibrated")), "none", help="what keys are held as differences from: zero, or their mean"
    )
    sinks: int = parameter(Integer(minimum=0), 4, help="with a centre: how many first positions have one of their own")
    seed: int = parameter(SEED, 0, help="seed of the random signs")
    residual: int = parameter(Integer(minimum=0), 0, help="how many of the newest entries are not packed")
    scales: str = parameter(SCALES, "half", help="norms in float16, or in the model's own precision")
    batch: int = parameter(Integer(minimum=1), 16, help="how many entries are packed at a time; 1 = each as it comes")

    @property
    def calibrated(self) -> bool:
        return self.centre == "calibrated"

    def formats(self, site: Site) -> Formats:
        keys = self._format(site, self.bits)
        means = checked(site, keys.to_basis) if self.calibrated else None
        return Formats(attrs.evolve(keys, means=means), self._format(site, self.value_bits or self.bits))

    def _format(self, site: Site, bits: int) -> Rotated:
        signs, stored = random_signs(self.name, site.geometry.head_dim, self.seed), scale_dtype(self.scales, site.dtype)
        return Rotated(signs, site.dtype, stored, bits, self.residual, self.batch, norm_correction=self.norm_correction)

    def calibrate(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """Per layer the means `first` [K, sinks, D] and `others` [K, D], float32; nothing without a centre."""
        return measured(samples, self.sinks) if self.calibrated else [{} for _ in samples]

    def check_calibration(self, site: Site) -> None:
        super().check_calibration(site)
        checked(site, self._format(site, self.bits).to_basis)
