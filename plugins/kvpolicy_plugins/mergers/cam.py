"""Merger `cam`: adds evicted values to the next kept ones."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Choice, Entries, Integer, Merger, Needs, View, parameter
from kvpolicy.stages.slots import gather
from kvpolicy_plugins.mergers.shared.assignment import kept_entries, next_kept
from kvpolicy_plugins.mergers.shared.merge_groups import count_by_target, evicted_of, sum_by_target, to_float
from kvpolicy_plugins.scorers.attention_based.attention import Attention
from kvpolicy_plugins.shared.limits import QUERIES_OR_ALL, SEED
from kvpolicy_plugins.shared.seeded_draws import uniform

_DRAWS = 2  # tells these draws from those of other plugins with the same seed


@attrs.frozen
class CaM(Merger):
    """Adds values of evicted entries to those of the next kept ones, with a probability by attention (CaM).

    With the attention A of the last queries (mean over the GQA group) and J, the next `window` kept entries after
    e, fewer near the end:

    1. pi = A_e / mean of A over J, from 0 to 1; 0/0 is 0. The released code takes the mean over all kept entries
       after e (`over: recent`: under StreamingLLM these are the recent window);
    2. b = 1 with probability pi, or b = pi for `mode: expected`;
    3. v_j + b·v_e / |J| for j in J. Keys do not change, and there is no normalisation.

    The method is made for decoding, where few entries are evicted at a time: if many are, large sums are added to few
    entries. Entries without a later kept one are dropped. Each draw is a hash of `seed`, layer, head, the newest
    position of the row and the entry's own: a repeated run draws the same numbers, independent of the batch.
    """

    name: ClassVar[str] = "cam"
    reference: ClassVar[str] = "openreview.net/forum?id=LCTmppB165"
    reads_window: ClassVar[bool] = True

    window: int = parameter(Integer(minimum=1), 32, help="m, how many kept entries each value is spread over")
    mode: str = parameter(Choice(("bernoulli", "expected")), "bernoulli", help="draw merges, or take expected values")
    over: str = parameter(
        Choice(("targets", "recent")), "targets", help="entries whose mean attention an entry is compared with"
    )
    queries: int = parameter(
        QUERIES_OR_ALL, 1, help="how many of the last queries attention is averaged over; 0 = all observed"
    )
    seed: int = parameter(SEED, 0, help="seed of the random draws")

    def needs(self) -> Needs:
        return Needs(queries=self.queries)

    def merge(self, view: View, kept: Tensor) -> Entries:
        if kept.shape[-1] == 0:
            return kept_entries(view, kept)
        start = next_kept(view, kept)
        later_count = (kept >= 0).sum(-1, keepdim=True) - start  # kept entries after each slot
        evicted = evicted_of(view, kept) & (later_count > 0)
        merged = self._probability(view, kept, start, later_count).masked_fill(~evicted, 0.0)
        if self.mode == "bernoulli":
            merged = (self._draws(view) < merged).to(merged.dtype)
        return kept_entries(
            view, kept, values=self._spread(view, kept, merged / later_count.clamp(1, self.window), start)
        )

    def _probability(self, view: View, kept: Tensor, start: Tensor, later_count: Tensor) -> Tensor:
        """Pi of every slot before the last kept one, [B, K, T] float32."""
        exact = attrs.evolve(view, keys=view.keys.float(), queries=view.window.float())
        attention = Attention(self.queries or view.window.shape[2]).score(exact)
        reach = later_count if self.over == "recent" else later_count.clamp(max=self.window)
        # window sums are differences of running sums, in float64 so that small ones are precise
        running = _running_sums(gather(attention[..., None], kept).double()).squeeze(-1)
        total = running.gather(-1, start + reach) - running.gather(-1, start)
        return (attention * reach / total).nan_to_num(0.0, posinf=1.0).clamp(0, 1).float()

    def _draws(self, view: View) -> Tensor:
        """Random numbers from 0 to 1, [B, K, T] float32; those of a row do not depend on other rows."""
        positions = view.positions.long()
        heads = torch.arange(positions.shape[1], device=positions.device)[None, :, None]
        newest = positions.amax((1, 2), keepdim=True)
        return uniform(self.seed, _DRAWS, view.layer, heads, newest, positions, device=positions.device)

    def _spread(self, view: View, kept: Tensor, weights: Tensor, start: Tensor) -> Tensor:
        """Merged values [B, K, N, Dv]."""
        unmerged, count = gather(view.values, kept), kept.shape[-1]
        target = start.clamp(max=count - 1)
        weights = weights.to(to_float(view.values[..., :0]).dtype)
        # entries with the same first target have the same targets, so they are summed first
        added = _window_sums(sum_by_target(weights, view.values, target, count), self.window)
        merged_counts = _window_sums(count_by_target((weights > 0).double(), target, count)[..., None], self.window)
        merged = (unmerged + added).to(unmerged.dtype)
        return torch.where((merged_counts > 0) & (kept >= 0)[..., None], merged, unmerged)


def _running_sums(numbers: Tensor) -> Tensor:
    """Sums of the first 0, 1, ..., N of [B, K, N, D], float64 [B, K, N + 1, D]."""
    start = torch.zeros_like(numbers[:, :, :1], dtype=torch.float64)
    return torch.cat([start, numbers.cumsum(2, dtype=torch.float64)], 2)


def _window_sums(numbers: Tensor, width: int) -> Tensor:
    """For each of [B, K, N, D], the sum of it and the `width` - 1 before it, float64."""
    running = _running_sums(numbers)
    indices = torch.arange(numbers.shape[2], device=numbers.device)
    return running[:, :, indices + 1] - running[:, :, (indices + 1 - width).clamp(min=0)]
