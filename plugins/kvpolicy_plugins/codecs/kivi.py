"""Keys quantised per channel, values per token."""

from collections.abc import Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Choice, Codec, Column, Format, Formats, Integer, Site, parameter
from kvpolicy_plugins.affine import BITS, SCALES, check_divides, dequantise, quantise, scale_dtype, working
from kvpolicy_plugins.packing import pack, packed_size, unpack


@attrs.frozen(eq=False)
class PerChannel(Format):
    """Each channel of `unit` consecutive tokens is one group."""

    dim: int  # D
    dtype: torch.dtype  # of the model's own vectors
    stored: torch.dtype  # of scales and minima
    bits: int
    unit: int
    step: int
    keep: int = 0
    columns: Mapping[str, Column] = attrs.field(init=False)

    @columns.default
    def _columns(self) -> dict[str, Column]:
        each = Column((self.dim,), self.stored)
        codes = Column((self.unit, packed_size(self.dim, self.bits)), torch.uint8)
        return {"codes": codes, "scale": each, "minimum": each}

    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 wherever they stand
        groups = vectors.to(working(vectors.dtype)).unflatten(2, (vectors.shape[2] // self.unit, self.unit))
        codes, scale, minimum = quantise(groups, -2, self.bits, self.stored)
        return {"codes": pack(codes, self.bits), "scale": scale.squeeze(-2), "minimum": minimum.squeeze(-2)}

    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:  # noqa: ARG002
        codes = unpack(columns["codes"], self.bits, self.dim)
        scale, minimum = (columns[name].unsqueeze(-2) for name in ("scale", "minimum"))
        return dequantise(codes, scale, minimum, self.dtype).flatten(2, 3)


@attrs.frozen(eq=False)
class PerToken(Format):
    """Each `group` of neighbouring channels of a token is one group."""

    dim: int  # D
    dtype: torch.dtype  # of the model's own vectors
    stored: torch.dtype  # of scales and minima
    bits: int
    group: int  # divides D
    keep: int = 0
    step: int = 1
    columns: Mapping[str, Column] = attrs.field(init=False)

    @columns.default
    def _columns(self) -> dict[str, Column]:
        each = Column((self.dim // self.group,), self.stored)
        codes = Column((packed_size(self.dim, self.bits),), torch.uint8)
        return {"codes": codes, "scale": each, "minimum": each}

    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 wherever they stand
        groups = vectors.to(working(vectors.dtype)).unflatten(-1, (self.dim // self.group, self.group))
        codes, scale, minimum = quantise(groups, -1, self.bits, self.stored)
        packed = pack(codes.flatten(-2), self.bits)
        return {"codes": packed, "scale": scale.squeeze(-1), "minimum": minimum.squeeze(-1)}

    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:  # noqa: ARG002
        codes = unpack(columns["codes"], self.bits, self.dim)
        scale, minimum = (columns[name].unsqueeze(-1) for name in ("scale", "minimum"))
        groups = codes.unflatten(-1, (self.dim // self.group, self.group))
        return dequantise(groups, scale, minimum, self.dtype).flatten(-2)


@attrs.frozen
class Kivi(Codec):
    """Asymmetric quantisation, keys along the tokens of a channel, values along the channels of a token (KIVI).

    Keys have outlier channels, values have none, so a group never mixes an outlier with ordinary numbers.
    The newest entries stay as they are: values the newest `residual`; keys until `residual` of them have come, and
    then all of those are quantised at once (algorithm 1).
    """

    name: ClassVar[str] = "kivi"
    reference: ClassVar[str] = "arXiv:2402.02750"

    bits: int = parameter(BITS, 4, help="bits per number")
    value_bits: int = parameter(Choice((0, 2, 4, 8)), 0, help="bits per number of the values; 0 = as `bits`")
    group: int = parameter(Integer(minimum=1), 32, help="tokens of a key group, and channels of a value group")
    residual: int = parameter(Integer(minimum=1), 128, help="how many of the newest entries stay as they are")
    scales: str = parameter(SCALES, "half", help="scales and minima in float16, or in the model's own precision")

    def __attrs_post_init__(self) -> None:
        if self.residual % self.group:
            raise ParameterError(f"residual: must be a multiple of group, which is {self.group}: {self.residual}")

    def formats(self, site: Site) -> Formats:
        dim = site.geometry.head_dim
        check_divides("group", self.group, dim)
        vectors = dim, site.dtype, scale_dtype(self.scales, site.dtype)
        return Formats(
            PerChannel(*vectors, self.bits, self.group, self.residual),
            PerToken(*vectors, self.value_bits or self.bits, self.group, self.residual),
        )
