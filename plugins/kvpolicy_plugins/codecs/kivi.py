"""Codec `kivi`: keys quantised per channel, values per token."""

from collections.abc import Mapping
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
    PackedColumn,
    Site,
    Unpacking,
    parameter,
)
from kvpolicy_plugins.codecs.shared.affine import (
    BITS,
    SCALES,
    check_divides,
    dequantise_channels,
    quantise_channels,
    scale_dtype,
)
from kvpolicy_plugins.codecs.shared.packing import packed_size
from kvpolicy_plugins.codecs.shared.per_token import PerToken
from kvpolicy_plugins.shared.limits import MOST_CHANNELS


@attrs.frozen(eq=False)
class PerChannel(Format):
    """Each channel of `group_size` consecutive tokens is a quantisation group."""

    dim: int  # D
    dtype: torch.dtype  # of the model's own vectors
    stored: torch.dtype  # of scales and minima
    bits: int
    group_size: int
    step: int
    residual_length: int = 0
    columns: Mapping[str, Column] = attrs.field(init=False)

    @columns.default
    def _columns(self) -> dict[str, Column]:
        scales = Column((self.dim,), self.stored)
        codes = Column((self.group_size, packed_size(self.dim, self.bits)), torch.uint8)
        return {"codes": codes, "scale": scales, "minimum": scales}

    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 at any position
        codes, scale, minimum = quantise_channels(vectors, self.group_size, self.bits, self.stored)
        return {"codes": codes, "scale": scale, "minimum": minimum}

    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        return self.decode_in_basis(columns, positions, self.dtype)

    def decode_in_basis(self, columns: Mapping[str, Tensor], positions: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        return dequantise_channels(columns["codes"], columns["scale"], columns["minimum"], self.bits, dtype)

    def unpacking(self) -> Unpacking | str:
        from kvpolicy_kernels.quantise.unpack import per_channel

        codes = PackedColumn(self.group_size * packed_size(self.dim, self.bits), torch.uint8)
        scales = PackedColumn(self.dim, self.stored, shared=True)
        return Unpacking(per_channel, (codes, scales, scales), self.group_size, (self.bits, self.group_size))


@attrs.frozen
class Kivi(Codec):
    """Asymmetric quantisation, keys along the tokens of a channel, values along the channels of a token (KIVI).

    Keys have outlier channels, values have none, so a group never has both outliers and ordinary numbers.
    The newest entries are not packed: of the values the newest `residual`, and behind them fewer than `batch` (the
    paper packs each as it leaves the residual: `batch: 1`); of the keys all until there are `residual` of them, which
    are then quantised at once (algorithm 1).
    """

    name: ClassVar[str] = "kivi"
    reference: ClassVar[str] = "arXiv:2402.02750"

    bits: int = parameter(BITS, 4, help="bits per number")
    value_bits: int = parameter(Choice((0, 2, 4, 8)), 0, help="bits per number of the values; 0 = as `bits`")
    group: int = parameter(
        Integer(minimum=1, maximum=MOST_CHANNELS), 32, help="tokens of a key group, and channels of a value group"
    )
    residual: int = parameter(Integer(minimum=1), 128, help="how many of the newest entries are not packed")
    scales: str = parameter(SCALES, "half", help="scales and minima in float16, or in the model's own precision")
    batch: int = parameter(Integer(minimum=1), 32, help="how many values are packed at a time; 1 = each as it comes")

    def __attrs_post_init__(self) -> None:
        if self.residual % self.group:
            raise ParameterError(f"residual: must be a multiple of group, which is {self.group}: {self.residual}")

    def formats(self, site: Site) -> Formats:
        dim = site.geometry.head_dim
        check_divides("group", self.group, dim)
        vectors = dim, site.dtype, scale_dtype(self.scales, site.dtype)
        return Formats(
            PerChannel(*vectors, self.bits, self.group, self.residual),
            PerToken(*vectors, self.value_bits or self.bits, self.group, self.residual, self.batch),
        )
