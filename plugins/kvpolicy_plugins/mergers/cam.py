"""Values spread over the entries that follow."""

import hashlib
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Choice, Entries, Integer, Merger, Needs, View, parameter
from kvpolicy.stages.slots import gather
from kvpolicy_plugins.mergers.shared.assignment import kept_entries, next_kept
from kvpolicy_plugins.mergers.shared.merge_groups import count_by_target, evicted_of, sum_by_target, to_float
from kvpolicy_plugins.scorers.attention import Attention
from kvpolicy_plugins.shared.limits import QUERIES_OR_ALL, SEED


@attrs.frozen
class CaM(Merger):
    """Values of evicted entries are added to those of the next kept ones, more likely if well attended (CaM).

    With the attention A of the last queries (mean over the GQA group) and J, the next `window` kept entries after
    e, fewer near the end:

    1. pi = A_e / mean of A over J, from 0 to 1; 0/0 is 0. The released code takes the mean over all kept entries
       after e (`over: recent`: under StreamingLLM these are the recent window);
    2. b = 1 with probability pi, or b = pi for `mode: expected`;
    3. v_j + b·v_e / |J| for j in J. Keys stay. Nothing is normalised: the values stand in for the lost ones.

    Made for decoding, where few entries leave at a time: where many are evicted at once, much is added to few.
    What no kept entry follows is dropped. Each row draws from a generator of its own, seeded by `seed`, the layer
    and the row's newest position: a repeated run draws the same, whatever else is in the batch.
    """

    name: ClassVar[str] = "cam"
    reference: ClassVar[str] = "openreview.net/forum?id=LCTmppB165"
    reads_window: ClassVar[bool] = True

    window: int = parameter(Integer(minimum=1), 32, help="m, how many kept entries each value is spread over")
    mode: str = parameter(Choice(("bernoulli", "expected")), "bernoulli", help="draw merges, or take expected values")
    over: str = parameter(
        Choice(("targets", "recent")), "targets", help="whose mean attention an entry is compared with"
    )
    queries: int = parameter(
        QUERIES_OR_ALL, 1, help="how many of the last queries attention is averaged over; 0 = all observed"
    )
    seed: int = parameter(SEED, 0, help="of the draws")

    def needs(self) -> Needs:
        return Needs(queries=self.queries)

    def merge(self, view: View, kept: Tensor) -> Entries:
        if kept.shape[-1] == 0:
            return kept_entries(view, kept)
        start = next_kept(view, kept)
        left = (kept >= 0).sum(-1, keepdim=True) - start  # kept entries after each slot
        evicted = evicted_of(view, kept) & (left > 0)
        merged = self._probability(view, kept, start, left).masked_fill(~evicted, 0.0)
        if self.mode == "bernoulli":
            merged = (self._draws(view) < merged).to(merged.dtype)
        return kept_entries(view, kept, values=self._spread(view, kept, merged / left.clamp(1, self.window), start))

    def _probability(self, view: View, kept: Tensor, start: Tensor, left: Tensor) -> Tensor:
        """Pi of every slot that is followed by a kept one, [B, K, T] float32."""
        exact = attrs.evolve(view, keys=view.keys.float(), queries=view.window.float())
        attention = Attention(self.queries or view.window.shape[2]).score(exact)
        reach = left if self.over == "recent" else left.clamp(max=self.window)
        # sums of windows as differences of running sums: in float64 no small one is lost among large ones
        running = _running(gather(attention[..., None], kept).double()).squeeze(-1)
        total = running.gather(-1, start + reach) - running.gather(-1, start)
        return (attention * reach / total).nan_to_num(0.0, posinf=1.0).clamp(0, 1).float()

    def _draws(self, view: View) -> Tensor:
        """Numbers from 0 to 1, [B, K, T] float32; those of a row do not depend on how long others are."""
        batch, heads, slots = view.positions.shape
        draws = torch.zeros(batch, slots, heads, dtype=torch.float32)
        newest, lengths = view.positions.amax((1, 2)).tolist(), view.lengths.amax(-1).tolist()
        for row, (position, length) in enumerate(zip(newest, lengths, strict=True)):
            named = f"{self.seed} {view.layer} {position}".encode()
            seed = int.from_bytes(hashlib.blake2b(named, digest_size=8).digest())
            random = torch.Generator().manual_seed(seed)
            draws[row, :length] = torch.rand(length, heads, generator=random, dtype=torch.float32)
        return draws.transpose(1, 2).to(view.keys.device)

    def _spread(self, view: View, kept: Tensor, weights: Tensor, start: Tensor) -> Tensor:
        """Values [B, K, N, Dv] with what is added to them."""
        before, count = gather(view.values, kept), kept.shape[-1]
        target = start.clamp(max=count - 1)
        weights = weights.to(to_float(view.values[..., :0]).dtype)
        # what starts at the same kept entry goes the same way, so it is summed first
        added = _windowed(sum_by_target(weights, view.values, target, count), self.window)
        arrivals = _windowed(count_by_target((weights > 0).double(), target, count)[..., None], self.window)
        merged = (before + added).to(before.dtype)
        return torch.where((arrivals > 0) & (kept >= 0)[..., None], merged, before)


def _running(parts: Tensor) -> Tensor:
    """Sums of the first 0, 1, ..., N of [B, K, N, D], float64 [B, K, N + 1, D]."""
    start = torch.zeros_like(parts[:, :, :1], dtype=torch.float64)
    return torch.cat([start, parts.cumsum(2, dtype=torch.float64)], 2)


def _windowed(parts: Tensor, width: int) -> Tensor:
    """For each of [B, K, N, D], the sum of it and the `width` - 1 before it, float64."""
    running = _running(parts)
    places = torch.arange(parts.shape[2], device=parts.device)
    return running[:, :, places + 1] - running[:, :, (places + 1 - width).clamp(min=0)]
