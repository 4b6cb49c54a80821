"""Merger `tome`: merges evicted values into the kept entry with the most similar key."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Entries, Merger, Number, View, parameter
from kvpolicy_plugins.mergers.shared.assignment import Assignment, kept_entries, norms_of
from kvpolicy_plugins.mergers.shared.merge_groups import evicted_of, nearest

_EPS = 1e-6


@attrs.frozen
class ToMe(Merger):
    """Merges values of evicted entries into the kept entry with the most similar key; keys do not change.

    kvpress' `MergingPress` (0.5.5), inspired by token merging. With the cosine similarity u of keys:

    1. an entry is merged if u >= `threshold` and u is among the highest `fraction` of its head;
    2. w_i = u_i · |v_i| / (|v_i| + |v_j| + 1e-6);
    3. v'_j = (v_j + Σ w_i·v_i) / (1 + Σ w_i).

    The threshold of `fraction` is the quantile 1 - `fraction`, linearly interpolated over the evicted entries of
    the head, with -inf for those below `threshold`. Where it falls between -inf and a number, kvpress gets NaN
    and merges nothing; here it is -inf.
    """

    name: ClassVar[str] = "tome"
    reference: ClassVar[str] = "arXiv:2210.09461"

    threshold: float = parameter(Number(minimum=0, maximum=1), 0.0, help="least cosine similarity for a merge")
    fraction: float = parameter(Number(above=0, maximum=1), 1.0, help="share of the evicted entries that are merged")

    def merge(self, view: View, kept: Tensor) -> Entries:
        if kept.shape[-1] == 0:
            return kept_entries(view, kept)
        evicted = evicted_of(view, kept)
        similarity, target = nearest(view.keys, kept, evicted, most=view.most_evicted)
        passed = similarity >= self.threshold
        if self.fraction < 1:
            ranked = similarity.masked_fill(~passed, -torch.inf)
            passed = passed & (similarity >= _quantile(ranked, evicted, 1 - self.fraction))
        weights = similarity * _share(norms_of(view.values), kept, target)
        folded = Assignment(kept, passed & (weights > 0), target)
        return kept_entries(view, kept, values=folded.blend(view.values, weights))


def _share(norms: Tensor, kept: Tensor, target: Tensor) -> Tensor:
    """[B, K, T]: norm of each value divided by the sum of its norm and that of its target."""
    other = norms.gather(-1, kept.clamp(min=0)).gather(-1, target)
    return norms / (norms + other + _EPS)


def _quantile(numbers: Tensor, among: Tensor, quantile: float) -> Tensor:
    """Interpolated quantile of numbers [B, K, T] where `among` is True, [B, K, 1]; -inf where the lower rank is."""
    ordered = numbers.masked_fill(~among, torch.inf).sort(-1).values
    rank = (among.sum(-1, keepdim=True) - 1).clamp(min=0).to(numbers.dtype) * quantile
    below = ordered.gather(-1, rank.floor().long())
    above = ordered.gather(-1, rank.ceil().long())
    return torch.lerp(below, above, rank.frac()).where(below.isfinite(), below)
