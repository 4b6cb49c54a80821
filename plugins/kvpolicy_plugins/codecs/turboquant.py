"""Codec `turboquant`: rotated keys in one codebook, values between their minimum and maximum."""

from typing import ClassVar

import attrs

from kvpolicy.stages import (
    AsIs,
    Choice,
    Codec,
    Flag,
    Format,
    Formats,
    Integer,
    Site,
    parameter,
)
from kvpolicy_plugins.codecs.shared.affine import (
    SCALES,
    scale_dtype,
)
from kvpolicy_plugins.codecs.shared.float8 import Float8
from kvpolicy_plugins.codecs.shared.hadamard import random_signs
from kvpolicy_plugins.codecs.shared.min_max_values import MinMaxValues
from kvpolicy_plugins.codecs.shared.rotated import Rotated
from kvpolicy_plugins.shared.limits import SEED

_FLOAT8 = 8  # bits of a key that is not rotated


@attrs.frozen
class TurboQuant(Codec):
    """Keys by a random rotation and one codebook, values between minimum and maximum, as vLLM ships TurboQuant.

    Keys are those of `rotation` (TurboQuant, section 3.1), decoded to the norm that they had: the levels of a vector
    are divided by their own norm rather than by √D (`norm_correction`). With 8 bits they are float8 (e4m3) instead,
    neither rotated nor scaled, and saturate at 448. Values are not rotated; a vector is one group.

    The paper rotates by a random orthogonal matrix, quantises values as keys, and adds one bit for unbiased inner
    products, or more bits for some channels. The engine (vLLM, `turboquant_4bit_nc` and others) does none of that, and
    neither does this. It differs from the engine in:
    - norms: the engine stores them, and divides by those of the levels whenever it reads; here the quotient is stored.
    - signs: later versions of the engine have none, and lose keys whose mean is a Walsh pattern, such as a constant: at
      4 bits the relative squared error is 0.18 rather than 0.009. `signs: none` is for parity. Earlier versions draw
      them for each layer, here all layers share them.
    - levels: the exact ones of Lloyd and Max; the engine's are up to 0.002 standard deviations off.
    - native layers: none by default. The engine has two at each end of a dense model, however few layers there are.
    - what float16 or float8 cannot hold is clamped.
    - a prompt, whole or in chunks, attends to its own tokens as they are; short chunks of the engine see them packed.
    """

    name: ClassVar[str] = "turboquant"
    reference: ClassVar[str] = "arXiv:2504.19874"

    key_bits: int = parameter(Choice((1, 2, 3, 4, _FLOAT8)), 4, help="bits per number of the keys; 8 = float8")
    value_bits: int = parameter(Choice((2, 3, 4)), 4, help="bits per number of the values")
    norm_correction: bool = parameter(Flag(), True, help="whether decoded keys have the norm of the keys")
    signs: str = parameter(Choice(("seeded", "none")), "seeded", help="random signs before the rotation, or none")
    seed: int = parameter(SEED, 0, help="seed of the random signs")
    native_first: int = parameter(
        Integer(minimum=0), 0, help="layers at the start that are not packed; at most a quarter of all"
    )
    native_last: int = parameter(
        Integer(minimum=0), 0, help="layers at the end that are not packed; at most a quarter of all"
    )
    residual: int = parameter(Integer(minimum=0), 0, help="how many of the newest entries are not packed")
    scales: str = parameter(SCALES, "half", help="norms, scales and minima in float16, or in the model's own precision")
    batch: int = parameter(Integer(minimum=1), 16, help="how many entries are packed at a time; 1 = each as it comes")

    def formats(self, site: Site) -> Formats:
        keys, layers = self._keys(site), site.geometry.layers
        first, last = (min(count, layers // 4) for count in (self.native_first, self.native_last))
        if not first <= site.layer < layers - last:
            return Formats(AsIs(), AsIs())
        stored = scale_dtype(self.scales, site.dtype)
        return Formats(
            keys, MinMaxValues(site.geometry.head_dim, site.dtype, stored, self.value_bits, self.residual, self.batch)
        )

    def _keys(self, site: Site) -> Format:
        dim = site.geometry.head_dim
        if self.key_bits == _FLOAT8:
            return Float8(dim, site.dtype, self.residual, self.batch)
        signs = random_signs(self.name, dim, self.seed)
        return Rotated(
            signs if self.signs == "seeded" else (1,) * dim,
            site.dtype,
            scale_dtype(self.scales, site.dtype),
            self.key_bits,
            self.residual,
            self.batch,
            norm_correction=self.norm_correction,
            upper_on_edge=True,
        )
