"""When layers are compressed: each as soon as its attention is done, or all of them at the end of a decode step."""

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvpolicy.plan.execute import compress_layers
from kvpolicy.plan.pipeline import Compressed
from kvpolicy.plan.plan import Plan
from kvpolicy.runtime.stats import LayerStats
from kvpolicy.runtime.together import Holder, compact_layers
from kvpolicy.stages import View

Rows = tuple[int, ...]


class Compressible(Holder, Protocol):
    """What a round does with a layer."""

    scaling: float

    @property
    def stats(self) -> LayerStats:
        """What happened in the layer so far."""

    def shown(self, rows: Sequence[int]) -> View:
        """The rows as plugins see them."""

    def budget(self, rows: Sequence[int]) -> list[int]:
        """Entries per KV head that each of the rows may keep."""

    def take(self, rows: Sequence[int], result: Compressed, *, fills: bool = False, moved: bool = False) -> None:
        """Reduce the rows to what a compression left of them, which may have `moved` into place already."""


class Round:
    """Collects the layers of one cache that are due in a decode step.

    The slack of `every` slots lets them wait, so that one launch of each kernel serves all. Layers whose views are
    copies do not wait: all copies at once would cost what the policy saves.
    """

    def __init__(self, plan: Plan, *, waits: bool) -> None:
        self.plan = plan
        self.waits = waits  # whether somebody says when a step ends
        self._waiting: list[tuple[Compressible, Rows]] = []  # a layer may wait with several groups of rows
        self.prompt_end: int | None = None  # how many tokens the prompt ends behind, where `generate` has told
        self._arrived: tuple[object, Tensor] | None = None

    def positions(self, real: Sequence[int], count: int, device: torch.device) -> Tensor:
        """Those of `count` tokens that arrive behind `real` in each row, int32 [B, count]; the same for all layers."""
        key = (tuple(real), count, device)
        if self._arrived is None or self._arrived[0] != key:
            places = torch.arange(count, device=device)
            self._arrived = key, (torch.tensor(real, device=device)[:, None] + places).to(torch.int32)
        return self._arrived[1]

    def due(self, layer: Compressible, rows: Sequence[int], *, decoding: bool, at_once: bool = False) -> None:
        """Compress some rows of a layer, in which as many entries are protected, now or when the step ends.

        `at_once` = in any case now.
        """
        if decoding and self.waits and not at_once:
            self._waiting.append((layer, tuple(rows)))
        else:
            _compress(self.plan, [layer], rows, fills=decoding and self.plan.fills_holes)

    def clear(self) -> None:
        """Forget who was due: the cache has been emptied."""
        self._waiting, self.prompt_end = [], None

    def end(self) -> None:
        """The step is over for all layers."""
        waiting, self._waiting = self._waiting, []
        self._arrived = None  # as long as a prompt
        kinds = sorted({(rows, layer.scaling) for layer, rows in waiting})
        for kind in kinds:
            alike = [layer for layer, rows in waiting if (rows, layer.scaling) == kind]
            _compress(self.plan, alike, kind[0], fills=self.plan.fills_holes)


def _compress(plan: Plan, layers: Sequence[Compressible], rows: Sequence[int], *, fills: bool) -> None:
    started = time.perf_counter()
    views = [layer.shown(rows) for layer in layers]
    results = compress_layers(plan, views, [layer.budget(rows) for layer in layers])
    moved = [False] * len(layers)
    if plan.kernels:
        moved = compact_layers(plan, layers, rows, results, fills=fills)
    for layer, result, done in zip(layers, results, moved, strict=True):
        layer.take(rows, result, fills=fills, moved=done)
    spent = (time.perf_counter() - started) / len(layers)
    for layer in layers:
        layer.stats.compressions += 1
        layer.stats.seconds += spent
