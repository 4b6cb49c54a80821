"""Scorer `lagkv`: how much an entry varies beside the entries that follow it."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Flag, Integer, Scorer, View, parameter

_LARGEST = 1e15  # of a normalised channel: squares of more, summed over channels, would overflow float32


@attrs.frozen
class LagKV(Scorer):
    """Spread of an entry's channels on the scale of the next partition of its head, LagKV (section 3).

    The entries that a head holds, in order of position, are the sinks, partitions of `lag` entries, and a remainder.
    For keys and values x of every partition but the last one:

    1. y = (x - min) / (max - min) per channel, with the extrema of the next partition, the reference;
    2. u = softmax over the partition of the standard deviation (unbiased) of y over the channels;
    3. score = mean of u for keys and u for values; without `cross` its rank within the partition, from 0 to
       (lag - 1) / lag, so that every partition keeps an equal share; of equals the earlier one ranks higher.

    Sinks, the last partition and the remainder score 1. A head with fewer than two partitions scores entries by age
    alone: j / (T - sinks) for the j-th one after the sinks. Scores are float32 [B, K, T].

    A channel that is constant in the reference has no scale, and the paper's division is 0/0 or infinite there: such a
    channel counts 0 for all entries. After a compression, partitions are made of what is left. The published code
    compresses each partition once, to a share of `lag`, when its reference is complete; under a budget partitions
    compete again at every compression.
    """

    name: ClassVar[str] = "lagkv"
    reference: ClassVar[str] = "arXiv:2504.04704"

    sinks: int = parameter(Integer(minimum=0), 4, help="first entries, before the first partition")
    lag: int = parameter(Integer(minimum=1), 128, help="entries of a partition")
    cross: bool = parameter(Flag(), False, help="compare scores of all partitions, not ranks within each")

    def tile(self) -> str:
        return "compares entries with those of the next partition"

    def score(self, view: View) -> Tensor:
        entries = view.positions.shape[-1]
        places = torch.arange(entries, device=view.positions.device)
        lengths = view.lengths[..., None]
        by_age = (places - self.sinks).float() / (lengths - self.sinks).clamp(min=1)
        partitions = (entries - self.sinks) // self.lag
        if partitions >= 2:
            inside = slice(self.sinks, self.sinks + (partitions - 1) * self.lag)
            scores = torch.ones_like(by_age)
            scores[..., inside] = self._scores(view, partitions)
            reference_end = ((places - self.sinks) // self.lag + 2) * self.lag + self.sinks
            scores = scores.masked_fill(reference_end > lengths, 1.0)
            by_age = scores.where(lengths >= self.sinks + 2 * self.lag, by_age)
        return by_age.masked_fill(places < self.sinks, 1.0)

    def _scores(self, view: View, partitions: int) -> Tensor:
        """[B, K, (M - 1) · lag] of all partitions but the last one, of M."""
        inside = slice(self.sinks, self.sinks + partitions * self.lag)
        shares = [
            _share_of_spread(vectors[:, :, inside].float().unflatten(2, (partitions, self.lag)))
            for vectors in (view.keys, view.values)
        ]
        scores = (shares[0] + shares[1]) / 2
        return (scores if self.cross else _ranks(scores)).flatten(2)


def _share_of_spread(vectors: Tensor) -> Tensor:
    """Steps 1 and 2: partitions of vectors [B, K, M, lag, D] to [B, K, M - 1, lag]."""
    reference = vectors[:, :, 1:]
    smallest, largest = reference.amin(3, keepdim=True), reference.amax(3, keepdim=True)
    scale = largest - smallest
    normalised = (vectors[:, :, :-1] - smallest) / scale.where(scale != 0, torch.inf)
    return normalised.clamp(-_LARGEST, _LARGEST).std(-1).softmax(-1)


def _ranks(scores: Tensor) -> Tensor:
    """[..., lag] to ranks from 0 to (lag - 1) / lag; NaN stays NaN."""
    lag = scores.shape[-1]
    places = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return ((lag - 1 - places).float() / lag).masked_fill(scores.isnan(), torch.nan)
