"""Merger `weighted`: means weighted by similarity."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Entries, Flag, Merger, View, parameter
from kvpolicy_plugins.mergers.shared.assignment import Assignment, kept_entries
from kvpolicy_plugins.mergers.shared.merge_groups import evicted_of, nearest

_LEAST = 1e-6


@attrs.frozen
class Weighted(Merger):
    """Merges evicted entries into the kept entry with the most similar key, in a mean weighted by similarity.

    `weighted` of KVCache-Factory, which comes from LOOK-M. With the cosine similarity u of keys,
    w_i = max((u_i + 1) / 2, 1e-6) and x'_j = (x_j + Σ w_i·x_i) / (1 + Σ w_i), for keys and for values.

    Keys are merged as cached, after the rotary embedding: the mean of two keys has neither of their positions.
    And a mean gets less attention than its members did together. `merge_keys: false` avoids the first problem.
    """

    name: ClassVar[str] = "weighted"
    reference: ClassVar[str] = "arXiv:2406.18139"

    merge_keys: bool = parameter(Flag(), True, help="merge keys too, not only values")

    def merge(self, view: View, kept: Tensor) -> Entries:
        similarity, target = nearest(view.keys, kept, evicted_of(view, kept), most=view.most_evicted)
        assignment = Assignment(kept, similarity > -torch.inf, target)
        weights = ((similarity + 1) / 2).clamp(min=_LEAST)
        keys = assignment.blend(view.keys, weights) if self.merge_keys else None
        return kept_entries(view, kept, keys=keys, values=assignment.blend(view.values, weights))
