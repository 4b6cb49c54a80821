"""Scorer `accumulated_attention`: keeps entries that received the most attention so far."""

from typing import ClassVar

import attrs
from torch import Tensor

from kvpolicy.stages import Needs, Scorer, Tile, View, parameter
from kvpolicy_plugins.shared.gqa_group import GROUP, reduce_group


@attrs.frozen
class AccumulatedAttention(Scorer):
    """Heavy hitters, H2O (section 4): the probabilities that an entry received, summed over all queries.

    As in the published code, sums are not divided by the number of queries that see an entry, so older entries have
    an advantage; the sums of evicted entries are lost.
    """

    name: ClassVar[str] = "accumulated_attention"
    reference: ClassVar[str] = "arXiv:2306.14048"
    layers_as_rows: ClassVar[bool] = True

    group: str = parameter(GROUP, "mean", help="how the query heads of a KV head are reduced to one")

    def needs(self) -> Needs:
        return Needs(attention=True)

    def in_any_order(self) -> bool:
        return True

    def tile(self) -> Tile:
        from kvpolicy_kernels.score.tiles.accumulated_attention import accumulated_attention
        from kvpolicy_kernels.score.tiles.grouping import HOW

        return Tile(accumulated_attention, (HOW[self.group],), keys=False, attention=True)

    def score(self, view: View) -> Tensor:
        if view.attention is None:
            raise ValueError("this view has no attention: accumulated_attention declares it in `needs`")
        return reduce_group(view.attention.float(), self.group).squeeze(2)
