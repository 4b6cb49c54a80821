"""Merger `d2o`: merges evicted entries that are similar to a kept one, drops others."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Choice, Entries, Merger, Number, State, View, parameter
from kvpolicy_plugins.mergers.shared.assignment import Assignment, kept_entries
from kvpolicy_plugins.mergers.shared.merge_groups import evicted_of, nearest

_STATE = "threshold"
_NO_THRESHOLD = -torch.inf


@attrs.frozen
class D2O(Merger):
    """Merges keys and values of evicted entries into a similar kept one; drops those without one (D2O).

    1. u = largest cosine similarity of an evicted entry's key to a kept key of its head;
    2. tau = mean of u over the row at its first trigger, then `alpha`·tau + `beta`·mean, carried per row
       (-inf: no trigger yet); a trigger that evicts nothing leaves it;
    3. an entry is merged iff the mean of u over the KV heads is at least tau: one decision for all heads that
       evict it now. The released code pairs the n-th evicted entries of all heads instead (`together: rank`);
    4. x'_j = (x_j + Σ u_i·x_i) / (1 + number of i), as released: it shrinks where u < 1. `normalize: softmax` is
       the paper's weighted mean: e^u for an evicted entry, e for the kept one (its similarity to itself is 1).
    """

    name: ClassVar[str] = "d2o"
    reference: ClassVar[str] = "arXiv:2406.13035"

    alpha: float = parameter(Number(minimum=0, maximum=1), 0.5, help="weight of the old threshold in the new one")
    beta: float = parameter(
        Number(minimum=0, maximum=1), 0.5, help="weight of the mean similarity in the new threshold"
    )
    normalize: str = parameter(
        Choice(("count", "softmax")), "count", help="divide by the number merged, or use weights that sum to one"
    )
    together: str = parameter(
        Choice(("position", "rank")),
        "position",
        help="which evicted entries of the heads share a decision: those at one position, or the n-th of each",
    )

    def row_state(self) -> tuple[State, ...]:
        return (State(_STATE, fill=_NO_THRESHOLD),)

    def merge(self, view: View, kept: Tensor) -> Entries:
        similarity, target = nearest(view.keys, kept, evicted_of(view, kept), most=view.most_evicted)
        comparable = similarity > -torch.inf
        threshold = self._threshold(view.row_state[_STATE], similarity, comparable)
        agreed = _mean_over_heads(similarity, comparable, *self._pairs(view, comparable))
        assignment = Assignment(kept, comparable & (agreed >= threshold[:, None, None]), target)
        entries = self._merged(view, assignment, similarity)
        return attrs.evolve(entries, row_state={_STATE: threshold.float()})

    def _threshold(self, old: Tensor, similarity: Tensor, comparable: Tensor) -> Tensor:
        """New tau, float64 [B], so that rounding does not put the mean of equal similarities above them."""
        total = similarity.double().masked_fill(~comparable, 0.0).sum((1, 2))
        count = comparable.sum((1, 2))
        mean = total / count.clamp(min=1)
        moved = torch.where(old == _NO_THRESHOLD, mean, self.alpha * old.double() + self.beta * mean)
        return torch.where(count > 0, moved, old.double())

    def _pairs(self, view: View, comparable: Tensor) -> tuple[Tensor, int]:
        """Int64 [B, K, T] and a bound: entries of a row with the same number share a decision."""
        if self.together == "rank":
            return (comparable.cumsum(-1) - 1).clamp(min=0), comparable.shape[-1]
        ascending, order = view.positions.flatten(1).sort(1)
        rank = (ascending.diff(dim=1, prepend=ascending[:, :1]) != 0).cumsum(1)  # of the position in its row
        numbers = torch.empty_like(rank).scatter_(1, order, rank)
        return numbers.view(view.positions.shape), rank.shape[1]

    def _merged(self, view: View, assignment: Assignment, similarity: Tensor) -> Entries:
        if self.normalize == "softmax":
            weights, divisor = (similarity - 1).exp(), None
        else:
            weights, divisor = similarity, 1 + assignment.merged_counts.to(similarity.dtype)
        keys = assignment.blend(view.keys, weights, divisor=divisor)
        return kept_entries(
            view, assignment.kept, keys=keys, values=assignment.blend(view.values, weights, divisor=divisor)
        )


def _mean_over_heads(similarity: Tensor, comparable: Tensor, pairs: Tensor, count: int) -> Tensor:
    """Float64 [B, K, T]: the mean over entries with the same number in `pairs`."""
    index = pairs.flatten(1)
    none = torch.zeros(len(pairs), count, dtype=torch.float64, device=pairs.device)
    sums = none.scatter_add(1, index, similarity.double().masked_fill(~comparable, 0.0).flatten(1))
    heads = none.scatter_add(1, index, comparable.double().flatten(1))
    return (sums / heads.clamp(min=1)).gather(1, index).reshape(pairs.shape)
