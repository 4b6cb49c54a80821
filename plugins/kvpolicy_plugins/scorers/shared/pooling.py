"""Pooling of scores over neighbouring candidates."""

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from kvpolicy.stages import Choice, Integer, View, parameter
from kvpolicy_plugins.shared.limits import WIDEST_POOL


@attrs.frozen
class Pool:
    """Pooling with a sliding window over the candidates, padded at the edges as in the published code."""

    kind: str = parameter(Choice(("none", "max", "average")), "none", help="how neighbours are combined")
    size: int = parameter(Integer(minimum=1, maximum=WIDEST_POOL, odd=True), 7, help="entries under the window")

    def over(self, view: View, scores: Tensor) -> Tensor:
        """Scores [B, K, ..., T] of a view, pooled over neighbours by position; undefined except for candidates."""
        if self.kind == "none":
            return scores
        candidates = view.candidates.reshape(*scores.shape[:2], *[1] * (scores.ndim - 3), -1)
        return view.in_slots(self(view.in_sequence(scores), view.in_sequence(candidates)))

    def __call__(self, scores: Tensor, candidates: Tensor) -> Tensor:
        """Scores [..., T], pooled where `candidates` (bool, broadcast) holds; undefined elsewhere.

        The padding is -inf for `max`, and zeros that count in the divisor for `average`.
        """
        if self.kind == "none" or not scores.numel():
            return scores
        outside = -torch.inf if self.kind == "max" else 0.0
        rows = scores.masked_fill(~candidates, outside).reshape(1, -1, scores.shape[-1])
        size = min(self.size, max(1, 2 * scores.shape[-1] - 1))  # already covers all entries
        pool = functional.max_pool1d if self.kind == "max" else functional.avg_pool1d
        pooled: Tensor = pool(rows, size, stride=1, padding=size // 2).reshape(scores.shape)
        return pooled * (size / self.size) if size < self.size and self.kind == "average" else pooled
