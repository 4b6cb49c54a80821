"""Merger `weightedkv`: averages evicted values into the next kept entry, weighted by attention."""

from typing import ClassVar

import attrs
from torch import Tensor

from kvpolicy.stages import Entries, Merger, Needs, View
from kvpolicy_plugins.mergers.shared.assignment import Assignment, kept_entries, next_kept
from kvpolicy_plugins.mergers.shared.merge_groups import evicted_of


@attrs.frozen
class WeightedKV(Merger):
    """Merges values of evicted entries into the next kept one, in a mean weighted by average attention (WeightedKV).

    With a = attention received / queries that saw the entry, averaged over the GQA group,
    v'_j = (a_j·v_j + Σ a_i·v_i) / (a_j + Σ a_i). "Next" is by position; entries after the last kept one
    are merged into that one. Entries without attention are dropped. Keys do not change.

    The attention of a kept entry does not change: that of merged entries is not added to it.
    """

    name: ClassVar[str] = "weightedkv"
    reference: ClassVar[str] = "arXiv:2503.01330"

    def needs(self) -> Needs:
        return Needs(attention=True)

    def merge(self, view: View, kept: Tensor) -> Entries:
        return kept_entries(view, kept, values=merged_values(view, kept, average_attention(view)))


def average_attention(view: View) -> Tensor:
    """[B, K, T] float32: mean attention per query that saw the entry, and per query head of the group."""
    if view.attention is None:
        raise ValueError("this view has no attention: declare it in the merger's `needs`")
    newest = view.positions.amax((1, 2), keepdim=True)
    queries = (newest - view.positions + 1).clamp(min=1)
    return (view.attention.mean(2) / queries).masked_fill(~view.valid, 0.0)


def merged_values(view: View, kept: Tensor, attention: Tensor) -> Tensor:
    """Values [B, K, N, Dv] of the kept slots, merged by the average attention [B, K, T] (float32 or float64)."""
    count = (kept >= 0).sum(-1, keepdim=True)
    target = next_kept(view, kept).minimum(count - 1).clamp(min=0)
    merged = evicted_of(view, kept) & (count > 0) & (attention > 0)
    own_weight = attention.gather(-1, kept.clamp(min=0))
    return Assignment(kept, merged, target).blend(view.values, attention, own_weight)
