"""Scorer `value_norm`: keeps large values."""

from typing import ClassVar

import attrs
from torch import Tensor
from torch.linalg import vector_norm

from kvpolicy.stages import Number, Scorer, Tile, View, parameter


@attrs.frozen
class ValueNorm(Scorer):
    """The norm of the value, which bounds what an entry adds to the output (VATP, section 3: `order: 1`)."""

    name: ClassVar[str] = "value_norm"
    reference: ClassVar[str] = "arXiv:2406.12335"
    layers_as_rows: ClassVar[bool] = True

    order: float = parameter(Number(minimum=0.1, maximum=100), 2, help="p of the p-norm")

    def in_any_order(self) -> bool:
        return True

    def tile(self) -> Tile:
        from kvpolicy_kernels.score.tiles.value_norm import value_norm

        special_order = int(self.order) if self.order in (1, 2) else 0
        return Tile(value_norm, (special_order,), (self.order,), keys=False, values=True)

    def score(self, view: View) -> Tensor:
        norms: Tensor = vector_norm(view.values.float(), ord=self.order, dim=-1)
        return norms
