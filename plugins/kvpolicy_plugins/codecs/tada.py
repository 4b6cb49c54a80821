"""Codec `tada`: the mean over the heads, and quantised differences from it."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import (
    Choice,
    Codec,
    Column,
    Format,
    Formats,
    Integer,
    Number,
    PackedColumn,
    Sample,
    Site,
    Unpacking,
    parameter,
)
from kvpolicy_plugins.codecs.shared.affine import (
    BITS,
    SCALES,
    cast_clamped,
    check_divides,
    compute_dtype,
    dequantise_tokens,
    quantise_tokens,
    scale_dtype,
)
from kvpolicy_plugins.codecs.shared.calibrated.bit_allocation import allocate_bits
from kvpolicy_plugins.codecs.shared.packing import packed_size
from kvpolicy_plugins.shared.limits import MOST_CHANNELS

_WIDTHS = (2, 4, 8)


@attrs.frozen(eq=False)
class Centred(Format):
    """The mean over the KV heads of a token, and each head's difference from it, quantised along its channels."""

    heads: int  # K
    dim: int  # D
    dtype: torch.dtype  # of the model's own vectors
    stored: torch.dtype  # of means, scales and minima
    bits: int
    group: int  # divides D
    residual_length: int = 0
    step: int = 1
    joint: bool = True
    columns: Mapping[str, Column] = attrs.field(init=False)

    @columns.default
    def _columns(self) -> dict[str, Column]:
        scales = Column((self.heads, self.dim // self.group), self.stored)
        codes = Column((self.heads, packed_size(self.dim, self.bits)), torch.uint8)
        return {"mean": Column((self.dim,), self.stored), "codes": codes, "scale": scales, "minimum": scales}

    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 at any position
        exact = vectors.to(compute_dtype(vectors.dtype)).movedim(1, 2)
        # Within this limit neither the sum over the heads nor a difference of two numbers is infinite.
        limit = torch.finfo(exact.dtype).max / (4 * self.heads)
        exact = exact.clamp(-limit, limit)
        mean = cast_clamped(exact.mean(2), self.stored)
        # From the stored mean, so that its rounding adds no error.
        differences = mean.to(exact.dtype)[:, :, None] - exact
        codes, scale, minimum = quantise_tokens(differences, self.group, self.bits, self.stored)
        columns = {"mean": mean, "codes": codes, "scale": scale, "minimum": minimum}
        return {name: column[:, None] for name, column in columns.items()}

    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:  # noqa: ARG002
        names = ("codes", "scale", "minimum")
        codes, scale, minimum = (columns[name][:, 0].movedim(2, 1).contiguous() for name in names)
        exact = compute_dtype(self.dtype)
        differences = dequantise_tokens(codes, scale, minimum, self.dim, self.bits, exact)
        return cast_clamped(columns["mean"].to(exact) - differences, self.dtype)

    def unpacking(self) -> Unpacking | str:
        from kvpolicy_kernels.quantise.unpack import centred

        if self.group.bit_count() != 1:
            return f"has groups of {self.group} channels, not a power of two"
        scales = PackedColumn(self.heads * self.dim // self.group, self.stored)
        codes = PackedColumn(self.heads * packed_size(self.dim, self.bits), torch.uint8)
        columns = PackedColumn(self.dim, self.stored), codes, scales, scales
        return Unpacking(centred, columns, options=(self.bits, self.group, self.heads), joint=True)


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
