"""Allocator `headkv`: heads that look back at what they copy keep more."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import AllocationRequest, Choice, Geometry, Number, parameter
from kvpolicy_plugins.allocators.shared.measured_heads import MeasuredHeads, divide, heads_of, require_all
from kvpolicy_plugins.allocators.shared.needle import retrieval_score


@attrs.frozen
class HeadKV(MeasuredHeads):
    """A floor for every head, and the rest by an importance that has been measured (HeadKV).

    Calibration: each row of a text has a needle of its own tokens, repeated at its end. With the attention a of each of
    the n last queries, importance of a head = sum of a / n of those of its n highest entries that are in the needle.

    Budgets, with `base` candidates per head on average and the importance e of KV heads:

    1. share = floor(base / beta); w = e / sum of e, w = w^exponent / sum of w^exponent over all layers and heads;
    2. a head keeps base - share, and w of share · heads.

    The importance is HeadKV-R2's: an entry in the needle counts whichever token is generated. Its needles are not made
    here: they answer a question by reasoning, in words, and a plugin is shown tokens of a text without their words. Nor
    is its rule that only runs with a QA-F1 above 50 % count: what is copied is given, so no run is wrong. Importances
    of query heads that the authors publish for some models, those of HeadKV-R2 too, can take the place of a text.

    Published code has a budget and a cache per query head; here the importance is reduced over the GQA group. It rounds
    each head by itself (`rounding: official`), and loses what a head has no room for; `conserve` has exact sums.
    """

    name: ClassVar[str] = "headkv"
    reference: ClassVar[str] = "arXiv:2410.19258"
    table_of_query_heads: ClassVar[bool] = True

    beta: float = parameter(Number(minimum=1, maximum=1e9), 1.1, help="the floor is 1 - 1 / beta of the mean")
    exponent: float = parameter(Number(minimum=0, maximum=100), 1.0, help="of the importance; `temp` in published code")
    rounding: str = parameter(Choice(("conserve", "official")), "conserve", help="exact sum, or the published code")

    def calibration_of(self, table: Tensor, geometry: Geometry) -> list[dict[str, Tensor]]:
        """Published importances of query heads, [H] float32, as parts of the largest: only their ratios count."""
        require_all(table >= 0, table, geometry, "importances must not be negative")
        parts = table / table.max().clamp(min=torch.finfo(torch.float64).tiny)
        return [{"importance": importance.float()} for importance in parts]

    def importance(self, attention: Tensor, inside: Tensor, length: int) -> Tensor:
        return retrieval_score(attention, inside, length)

    def allocate(self, request: AllocationRequest) -> Tensor:
        room, importance = heads_of(request)
        base = request.total.double() / room.shape[1]
        share = torch.floor_divide(base, self.beta)
        total = importance.sum((1, 2)).clamp(min=torch.finfo(torch.float64).tiny)
        weights = (importance.flatten(1) / total[:, None]) ** self.exponent
        return divide(request, weights, base - share, exact=self.rounding == "conserve")
