"""Allocator `surfacelogic`: heads whose attention is on what they copy, and on little else, keep more."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import AllocationRequest, Choice, Integer, Number, parameter
from kvpolicy_plugins.allocators.shared.measured_heads import MeasuredHeads, divide, heads_of
from kvpolicy_plugins.allocators.shared.needle import best_inside

_SMALL = 1e-9  # denominators below are zero
_LAYER = 0.01  # weight of a head's share of its own layer
_MORE = 0.5  # entries that the floor has on top


@attrs.frozen
class SurfaceLogic(MeasuredHeads):
    """A floor for every head, and the rest by inference scores (SurfaceLogicKV).

    Code-derived: the formulas are those of the repository DiliLazyKV, very probably the method's earlier name.

    Calibration as in `headkv`, with another importance. Of the attention of a query to its `top` highest entries, WTP
    is inside the needle and WFP outside; WFN is the attention to the rest of the needle.
    Precision = WTP / (WTP + WFP), recall = WTP / (WTP + WFN); the importance of a head is their harmonic mean.

    Budgets, with `base` candidates per head on average and the importance x of KV heads:

    1. share = floor(base / beta); s = x^exponent; w = s + 0.01 · s / (sum of s in the layer), then w / sum of w;
    2. a head keeps base - share + 1/2, and w of (share - 1/2) · heads, if share is not 0.

    Published code has a budget and a cache per query head, rounds each head by itself (`rounding: official`), and
    counts only tests that were answered well; here the importance is reduced over the GQA group, and no text generated.
    """

    name: ClassVar[str] = "surfacelogic"
    reference: ClassVar[str] = "arXiv:2508.15806"
    calibrated_by: ClassVar[tuple[str, ...]] = ("needle", "top")

    top: int = parameter(Integer(minimum=1, maximum=4096), 10, help="highest entries of a query that are looked at")
    beta: float = parameter(Number(minimum=1, maximum=1e9), 1.351, help="the floor is 1 - 1 / beta of the mean")
    exponent: float = parameter(Number(minimum=0, maximum=100), 1.0, help="of the importance; `temp` in published code")
    rounding: str = parameter(Choice(("conserve", "official")), "conserve", help="exact sum, or the published code")

    def importance(self, attention: Tensor, inside: Tensor, length: int) -> Tensor:  # noqa: ARG002 not by length
        precision, recall = self.precision_recall(attention, inside)
        both = precision + recall
        return (2 * precision * recall / both.clamp(min=_SMALL)).where(both >= _SMALL, 0.0)

    def precision_recall(self, attention: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted precision and recall, [...], of attention [..., T]."""
        found, distracted = best_inside(attention, inside, self.top)
        needle = attention.where(inside, 0.0).sum(-1).maximum(found)
        looked_at = found + distracted
        precision = (found / looked_at.clamp(min=_SMALL)).where(looked_at >= _SMALL, 0.0)
        return precision, (found / needle.clamp(min=_SMALL)).where(needle >= _SMALL, 0.0)

    def allocate(self, request: AllocationRequest) -> Tensor:
        room, importance = heads_of(request)
        base = request.total.double() / room.shape[1]
        share = torch.floor_divide(base, self.beta)
        powers = importance**self.exponent
        weights = powers + _LAYER * powers / (powers.sum(-1, keepdim=True) + _SMALL)
        floor = base - (share - _MORE).clamp(min=0)
        return divide(request, weights.flatten(1), floor, exact=self.rounding == "conserve")
