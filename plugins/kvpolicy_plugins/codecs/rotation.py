"""Codec `rotation`: randomly rotated vectors, quantised with one codebook."""

from typing import ClassVar

import attrs

from kvpolicy.stages import Codec, Formats, Integer, Site, parameter
from kvpolicy_plugins.codecs.shared.affine import SCALES, scale_dtype
from kvpolicy_plugins.codecs.shared.rotated import Rotated, random_signs
from kvpolicy_plugins.shared.limits import SEED


@attrs.frozen
class Rotation(Codec):
    """A random rotation, then the best scalar codebook for normal numbers (TurboQuant, section 3.1).

    With random signs s and the Hadamard matrix H, the coordinates of √D · H (s · x) / ‖x‖ are nearly standard normal,
    for every x. There is no calibration, and only the norm is stored per vector. The second stage of the paper,
    one bit for unbiased inner products, and its mixed widths are not implemented.
    """

    name: ClassVar[str] = "rotation"
    reference: ClassVar[str] = "arXiv:2504.19874"

    bits: int = parameter(Integer(minimum=1, maximum=4), 4, help="bits per number")
    seed: int = parameter(SEED, 0, help="seed of the random signs")
    residual: int = parameter(Integer(minimum=0), 0, help="how many of the newest entries are not packed")
    scales: str = parameter(SCALES, "half", help="norms in float16, or in the model's own precision")
    batch: int = parameter(Integer(minimum=1), 16, help="how many entries are packed at a time; 1 = each as it comes")

    def formats(self, site: Site) -> Formats:
        signs = random_signs(self.name, site.geometry.head_dim, self.seed)
        rotated = Rotated(signs, site.dtype, scale_dtype(self.scales, site.dtype), self.bits, self.residual, self.batch)
        return Formats(rotated, rotated)
