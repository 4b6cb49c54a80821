"""Codec `tada`: the mean over the heads, and quantised differences from it."""

from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Choice, Codec, Formats, Integer, Number, Sample, Site, parameter
from kvpolicy_plugins.codecs.shared.affine import BITS, SCALES, check_divides, compute_dtype, scale_dtype
from kvpolicy_plugins.codecs.shared.calibrated.bit_allocation import allocate_bits
from kvpolicy_plugins.codecs.tada_format import Centred
from kvpolicy_plugins.shared.limits import MOST_CHANNELS

_WIDTHS = (2, 4, 8)


@attrs.frozen
class Tada(Codec):
    """Stores the mean over the heads in 16 bits, and the differences from it in few bits (TaDA).

    Heads of a token share their outliers, so the differences have none. The newest `residual` entries are not packed;
    older ones are packed `batch` entries at a time. With `bits: auto` a calibration chooses the bits of each layer: at
    most `mean_bits` on average, with the least sum of relative errors of the attention output. The search is exact;
    the paper samples at random.

    Relative to 16 bits an entry takes bits/16 + 1/K + 2/g: with few KV heads K, or short groups g, the mean and the
    scales weigh more than the codes.
    """

    name: ClassVar[str] = "tada"
    reference: ClassVar[str] = "arXiv:2506.04642"
    calibrated_by: ClassVar[tuple[str, ...]] = ("bits", "group", "scales", "mean_bits")

    bits: int | str = parameter(Choice((*_WIDTHS, "auto")), 4, help="bits per number; auto = calibrated for each layer")
    group: int = parameter(Integer(minimum=0, maximum=MOST_CHANNELS), 0, help="channels of a group; 0 = all of a head")
    residual: int = parameter(Integer(minimum=0), 128, help="how many of the newest entries are not packed")
    batch: int = parameter(Integer(minimum=1), 32, help="how many entries are packed at a time")
    scales: str = parameter(SCALES, "half", help="means, scales and minima in float16, or in the model's own precision")
    mean_bits: float = parameter(Number(minimum=2, maximum=8), 3.5, help="with bits: auto, their average over layers")

    @property
    def joint(self) -> bool:
        return True

    @property
    def calibrated(self) -> bool:
        return self.bits == "auto"

    def formats(self, site: Site) -> Formats:
        centred = self._format(site, self._bits(site))
        return Formats(centred, centred)

    def calibrate(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """Per layer `bits`, an int64 scalar."""
        if not self.calibrated:
            return [{} for _ in samples]
        capacity = int(len(samples) * self.mean_bits + 1e-6)
        errors = [[self._error(sample, bits) for bits in _WIDTHS] for sample in samples]
        chosen = allocate_bits(errors, _WIDTHS, capacity)
        return [{"bits": torch.tensor(_WIDTHS[width])} for width in chosen]

    def check_calibration(self, site: Site) -> None:
        self._bits(site)

    def _bits(self, site: Site) -> int:
        if isinstance(self.bits, int):
            return self.bits
        if "bits" not in site.calibration:
            raise ParameterError("bits: needs a calibration: 'auto'")
        calibrated_bits = site.calibration["bits"]
        if calibrated_bits.dtype != torch.int64 or calibrated_bits.ndim:
            raise ParameterError(
                f"bits: must be one int64 in the calibration: {list(calibrated_bits.shape)} of {calibrated_bits.dtype}"
            )
        bits = int(calibrated_bits)
        if not BITS.accepts(bits):
            raise ParameterError(f"bits: must be {BITS} in the calibration: {bits}")
        return bits

    def _format(self, site: Site, bits: int) -> Centred:
        heads, dim = site.geometry.kv_heads, site.geometry.head_dim
        check_divides("group", self.group or dim, dim)
        stored = scale_dtype(self.scales, site.dtype)
        return Centred(heads, dim, site.dtype, stored, bits, self.group or dim, self.residual, self.batch)

    def _error(self, sample: Sample, bits: int) -> float:
        """Error of the attention output with quantised keys and values, relative to its norm."""
        exact = _attention(sample, sample.keys, sample.values)
        kv_format = self._format(Site(sample.geometry, sample.keys.dtype), bits)
        positions = torch.arange(sample.keys.shape[2], device=sample.keys.device).expand(sample.keys.shape[:3])
        decoded = [
            kv_format.decode(kv_format.encode(vectors, positions), positions)
            for vectors in (sample.keys, sample.values)
        ]
        error = (_attention(sample, *decoded) - exact).norm() / exact.norm().clamp(min=torch.finfo(exact.dtype).tiny)
        return float(error)


def _attention(sample: Sample, keys: Tensor, values: Tensor) -> Tensor:
    """Output [S, H, T, D] of causal attention, in the working dtype."""
    exact = compute_dtype(keys.dtype)
    queries, keys, values = sample.queries.to(exact), keys.to(exact), values.to(exact)
    return torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, is_causal=True, scale=sample.scaling, enable_gqa=True
    )
