"""Entries as they are."""

from collections.abc import Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Codec, Column, Geometry


@attrs.frozen
class Plain(Codec):
    """Keys and values in the model's own dtype. Nothing is computed and nothing is copied."""

    name: ClassVar[str] = "plain"

    def columns(self, geometry: Geometry, dtype: torch.dtype) -> dict[str, Column]:
        column = Column((geometry.head_dim,), dtype)
        return {"keys": column, "values": column}

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return {"keys": keys, "values": values}

    def decode(self, columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return columns["keys"], columns["values"]
