"""What allocators share that divide a budget by an importance of each head, measured on a model beforehand."""

import abc
from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import AllocationRequest, Choice, Geometry, Integer, JointAllocator, Sample, Site, View, parameter
from kvpolicy_plugins.allocators.shared.apportion import apportion, water_fill
from kvpolicy_plugins.allocators.shared.needle import Needles

_LEAST = 1e-10  # of the importance of all heads: what a head has that has none, so that nobody divides by zero


@attrs.frozen
class MeasuredHeads(JointAllocator):
    """Measures the importance of query heads while they copy needles, and shows it of KV heads."""

    calibrated_by: ClassVar[tuple[str, ...]] = ("needle",)

    needle: int = parameter(Integer(minimum=1, maximum=4096), 32, help="tokens to copy; at most a quarter of a row")
    group: str = parameter(Choice(("max", "mean")), "mean", help="how the query heads of a KV head are reduced to one")

    @abc.abstractmethod
    def importance(self, attention: Tensor, inside: Tensor, length: int) -> Tensor:
        """[S, H, n], not negative, of attention [S, H, n, T] where `length` slots are `inside` the needle."""

    @property
    def calibrated(self) -> bool:
        return True

    def probes(self, tokens: Tensor) -> Tensor:
        return Needles.of(len(tokens), tokens.shape[1], self.needle, tokens.device).repeated(tokens)

    def calibrate(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """The importance of each query head, [H] float32: the mean over rows and over the tokens that are copied."""
        return [{"importance": self._of_layer(sample)} for sample in samples]

    def _of_layer(self, sample: Sample) -> Tensor:
        rows, _, tokens, _ = sample.keys.shape
        needles = Needles.of(rows, tokens, self.needle, sample.keys.device)
        return self.importance(needles.attention(sample), needles.inside, needles.length).mean((0, 2))

    def check_calibration(self, site: Site) -> None:
        super().check_calibration(site)
        given = {name: tuple(tensor.shape) for name, tensor in site.calibration.items()}
        expected = {"importance": (site.geometry.query_heads,)}
        if given != expected:
            raise ParameterError(f"must be {expected}: {given}")
        if bool((site.calibration["importance"] < 0).any()):
            raise ParameterError("the importance of a head must not be negative")

    def statistics(self, view: View) -> Tensor:
        """The importance of each KV head, [B, K] float32: the same in all rows."""
        of_group = view.calibration["importance"].to(torch.float32).unflatten(0, (view.keys.shape[1], -1))
        importance: Tensor = of_group.amax(1) if self.group == "max" else of_group.mean(1)
        return importance.expand(view.keys.shape[0], -1)


def require_all(hold: Tensor, table: Tensor, geometry: Geometry, rule: str) -> None:
    """Raise ParameterError with the first number of a table [L, heads] that does not `hold`, of the same shape."""
    wrong = (~hold).nonzero().tolist()
    if wrong:
        layer, head = wrong[0]
        number = table[layer, head].item()
        raise ParameterError(f"{rule}: layer {geometry.managed[layer]}, head {head} has {number:.6g}")


def heads_of(request: AllocationRequest) -> tuple[Tensor, Tensor]:
    """The room [B, L·K] int64 and the importance [B, L, K] float64 of all heads."""
    if request.statistics is None:
        raise ValueError("this request has no statistics")
    return request.room.transpose(0, 1).flatten(1), request.statistics.transpose(0, 1).double()


def counts_of(flat: Tensor, request: AllocationRequest) -> Tensor:
    """[B, L·K] as [L, B, K]."""
    counts: Tensor = flat.unflatten(1, (request.room.shape[0], -1)).transpose(0, 1)
    return counts.contiguous()


def divide(request: AllocationRequest, weights: Tensor, floor: Tensor, *, exact: bool) -> Tensor:
    """Candidates of each head, [L, B, K]: `floor` [B] for all, and shares of what is left by `weights` [B, L·K].

    What a head has no room for goes to the others: first their equal parts of the floors, then by their weights. Not
    `exact`: every head is rounded by itself, to even, and keeps at most what it holds, as in published code.
    """
    room, _ = heads_of(request)
    heads = room.shape[1]
    guaranteed = floor * heads
    pool = (request.total - guaranteed).clamp(min=0)
    share = (weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=_LEAST)
    if not exact:
        return counts_of((share * pool[:, None] + floor[:, None]).round().long().minimum(room), request)
    floors = water_fill(room, guaranteed)
    quotas = floors + water_fill(room - floors, pool, share)
    return counts_of(apportion(quotas, request.total), request)
