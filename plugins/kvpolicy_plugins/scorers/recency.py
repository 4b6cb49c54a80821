"""Scorer `recency`: keeps the newest entries."""

from typing import ClassVar

import attrs
from torch import Tensor

from kvpolicy.stages import Scorer, Tile, View


@attrs.frozen
class Recency(Scorer):
    """The position of an entry: with protected sinks, StreamingLLM (section 3.2) at the original positions.

    Relative to the newest entry, because float32 does not represent all integers beyond 2^24.
    """

    name: ClassVar[str] = "recency"
    reference: ClassVar[str] = "arXiv:2309.17453"
    layers_as_rows: ClassVar[bool] = True

    def in_any_order(self) -> bool:
        return True

    def tile(self) -> Tile:
        from kvpolicy_kernels.score.tiles.recency import recency

        return Tile(recency, keys=False, newest=True)

    def score(self, view: View) -> Tensor:
        newest = view.positions.amax(dim=(1, 2), keepdim=True)
        return (view.positions - newest).float()
