"""What readers keep of a page to bound q·k of its keys."""

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Column, Format


@attrs.frozen(eq=False)
class Bounds(Format):
    """Minimum and maximum of each channel of a page's keys."""

    dim: int  # D
    dtype: torch.dtype  # of the model's own keys
    group_size: int
    step: int
    columns: Mapping[str, Column] = attrs.field(init=False)

    @columns.default
    def _columns(self) -> dict[str, Column]:
        return {name: Column((self.dim,), self.dtype) for name in ("minimum", "maximum")}

    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 bounds have no position
        keys = vectors.unflatten(2, (-1, self.group_size))
        return {"minimum": keys.amin(3), "maximum": keys.amax(3)}

    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        raise NotImplementedError("the keys of a page cannot be decoded from its bounds")
