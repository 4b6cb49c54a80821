"""Merger `kvmerger`: merges runs of similar neighbours."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Entries, Merger, Number, View, parameter
from kvpolicy_plugins.mergers.shared.assignment import Assignment, kept_entries, norms_of
from kvpolicy_plugins.mergers.shared.merge_groups import directions, evicted_of, kept_index, to_float


@attrs.frozen
class KVMerger(Merger):
    """Merges evicted entries into a kept one of the same run of similar keys, with a Gaussian kernel (KVMerger).

    In KVMerger the similarity of keys decides how many entries are kept. Here the budget does, and the published
    merging sets decide how evicted entries are merged:

    1. neighbouring entries of a head, both unprotected, are in one run if the cosine similarity of
       their keys is above `similarity`;
    2. the kept entries of a run are its pivots. Each evicted one joins the nearest of them, the earlier one if two
       are equally near; in a run without a kept entry it is dropped. A pivot and what joins it are a merging set;
    3. g_i = exp(-|k_p - k_i|² / 2s²) with s = mean distance of what joins from the pivot, whose own g is 1;
    4. k' = Σ g_i·k_i / Σ g_i, and v' alike, without a factor for the size of the set.

    Sink tokens and the recent window never change. Keys are merged as cached, after the rotary embedding.
    """

    name: ClassVar[str] = "kvmerger"
    reference: ClassVar[str] = "arXiv:2407.08454"

    similarity: float = parameter(
        Number(minimum=-1, maximum=1), 0.75, help="cosine similarity above which neighbours are in one run"
    )

    def merge(self, view: View, kept: Tensor) -> Entries:
        evicted = evicted_of(view, kept)
        runs = self._runs(view)
        pivot = _nearest_pivot(runs, view.valid & ~evicted)
        kept_position = kept_index(kept, pivot.shape[-1]).gather(-1, pivot.clamp(min=0))
        assignment = Assignment(kept, evicted & (pivot >= 0), kept_position.clamp(min=0))
        weights = _kernel(view.keys, pivot.clamp(min=0), assignment)
        keys = assignment.blend(view.keys, weights)
        return kept_entries(view, kept, keys=keys, values=assignment.blend(view.values, weights))

    def _runs(self, view: View) -> Tensor:
        """[B, K, T] int64: entries with the same number are in one run."""
        unit = directions(view.keys)
        cosine = (unit[:, :, 1:] * unit[:, :, :-1]).sum(-1)
        linked = view.candidates[..., 1:] & view.candidates[..., :-1] & (cosine > self.similarity)
        starts = torch.cat([torch.zeros_like(view.valid[..., :1]), ~linked], -1)
        return starts.cumsum(-1)


def _nearest_pivot(runs: Tensor, is_kept: Tensor) -> Tensor:
    """[B, K, T] int64: the nearest kept slot in the run of each slot, the earlier of two; -1 if none."""
    last = runs.shape[-1]
    slots = torch.arange(last, device=runs.device).expand_as(runs)
    earlier = slots.masked_fill(~is_kept, -1).cummax(-1).values
    later = slots.masked_fill(~is_kept, last).flip(-1).cummin(-1).values.flip(-1)
    to_earlier = (slots - earlier).masked_fill(~_same_run(runs, earlier), last)
    to_later = (later - slots).masked_fill(~_same_run(runs, later), last)
    nearest = torch.where(to_earlier <= to_later, earlier, later)
    return nearest.masked_fill(to_earlier.minimum(to_later) == last, -1)


def _same_run(runs: Tensor, slots: Tensor) -> Tensor:
    """Whether `slots` [B, K, T] exist and are in the same run as the slots at their index."""
    inside = (slots >= 0) & (slots < runs.shape[-1])
    return inside & (runs.gather(-1, slots.clamp(0, runs.shape[-1] - 1)) == runs)


def _kernel(keys: Tensor, pivot: Tensor, assignment: Assignment) -> Tensor:
    """Weights of what joins, [B, K, T]; 1 for an equal key."""
    keys = to_float(keys)
    distance = norms_of(keys - keys.gather(2, pivot[..., None].expand_as(keys)))
    width = assignment.total(distance) / assignment.merged_counts.clamp(min=1).to(distance.dtype)
    if width.shape[-1] == 0:
        return distance
    relative = distance / width.gather(-1, assignment.target)
    return (relative.square() / -2).exp().where(distance > 0, 1.0)
