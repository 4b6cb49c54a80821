"""Merger `pivot`: means of pairwise means."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Entries, Flag, Merger, View, parameter
from kvpolicy_plugins.mergers.shared.assignment import Assignment, kept_entries
from kvpolicy_plugins.mergers.shared.merge_groups import evicted_of, nearest


@attrs.frozen
class Pivot(Merger):
    """Merges evicted entries into the kept entry with the most similar key, each averaged with it first.

    `pivot` of KVCache-Factory, which comes from LOOK-M. x'_j is the mean of x_j and of all (x_j + x_i) / 2, for
    keys (as cached, after the rotary embedding) and for values: x_j keeps half the weight for any number of x_i.
    """

    name: ClassVar[str] = "pivot"
    reference: ClassVar[str] = "arXiv:2406.18139"

    merge_keys: bool = parameter(Flag(), True, help="merge keys too, not only values")

    def merge(self, view: View, kept: Tensor) -> Entries:
        similarity, target = nearest(view.keys, kept, evicted_of(view, kept), most=view.most_evicted)
        assignment = Assignment(kept, similarity > -torch.inf, target)
        weights = torch.full_like(similarity, 0.5)
        own_weight = 1 + assignment.merged_counts.to(weights.dtype) / 2
        keys = assignment.blend(view.keys, weights, own_weight) if self.merge_keys else None
        return kept_entries(view, kept, keys=keys, values=assignment.blend(view.values, weights, own_weight))
