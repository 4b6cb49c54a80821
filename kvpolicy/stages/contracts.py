"""One contract per stage. A plugin is a frozen attrs class that keeps one of them and holds no run state."""

import abc
from collections.abc import Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages.geometry import Geometry
from kvpolicy.stages.view import View


class Plugin(abc.ABC):
    """What all stages share: the name used in YAML, and where the method was published."""

    stage: ClassVar[str]
    name: ClassVar[str]
    reference: ClassVar[str] = ""


@attrs.frozen
class Needs:
    """What a scorer reads besides the entries; the runtime observes nothing that no scorer asks for."""

    queries: int = 0  # W, the last queries to keep
    attention: bool = False  # the mass each entry receives, summed over all queries


@attrs.frozen
class SlotState:
    """One float32 per slot that the cache carries for a scorer: moved with its entry, `fill` for a new one."""

    name: str
    fill: float = 0.0


class Scorer(Plugin):
    """Gives every held entry a worth."""

    stage = "score"

    def needs(self) -> Needs:
        """What must be observed for this scorer."""
        return Needs()

    def slot_state(self) -> tuple[SlotState, ...]:
        """State carried per slot from one compression to the next."""
        return ()

    def observe(self, view: View) -> Mapping[str, Tensor]:  # noqa: ARG002 the default observes nothing
        """New values of the declared slot state, each [B, K, T] float32; `score` then sees them in the view."""
        return {}

    @abc.abstractmethod
    def score(self, view: View) -> Tensor:
        """Float32 [B, K, T], larger = keep. Only candidates are compared; other slots may hold any number."""


@attrs.frozen
class LayerRequest:
    """What a layer allocator has to divide. Counts are entries per KV head."""

    layers: int  # L
    budget: int  # average per layer, protected entries included
    protected: int  # entries that every layer keeps anyway
    length: int  # tokens the sequence has so far


class LayerAllocator(Plugin):
    """Divides the budget over the layers."""

    stage = "allocate.layers"

    @abc.abstractmethod
    def allocate(self, request: LayerRequest) -> tuple[int, ...]:
        """Entries per KV head for each layer: sum L * min(budget, length), each from `protected` to `length`."""


class HeadAllocator(Plugin):
    """Divides a layer's budget over its KV heads."""

    stage = "allocate.heads"
    ragged: ClassVar[bool] = True  # whether heads can end up with different lengths

    @abc.abstractmethod
    def allocate(self, scores: Tensor, candidates: Tensor, budget: Tensor) -> Tensor:
        """Candidates to keep per head, int64 [B, K].

        `scores` [B, K, T] float32, `candidates` [B, K, T] bool, `budget` [B] int64: candidates to keep in all heads
        of a row together. Each row sums to min(budget, its candidates), no head above its own candidates.
        """


class Selector(Plugin):
    """Chooses which candidates stay."""

    stage = "select"

    @abc.abstractmethod
    def select(self, scores: Tensor, candidates: Tensor, counts: Tensor) -> Tensor:
        """Bool [B, K, T]: the candidates to keep, `counts` [B, K] of them in each head.

        Ties: the higher score, then the earlier position (the lower slot).
        """


@attrs.frozen(eq=False)
class Entries:
    """What a layer holds after a compression, N slots per head, `-1` padded like `kept`."""

    keys: Tensor  # [B, K, N, D]
    values: Tensor  # [B, K, N, Dv]
    log_votes: Tensor | None = None  # [B, K, N] float32


class Merger(Plugin):
    """Decides what becomes of evicted entries."""

    stage = "merge"
    votes: ClassVar[bool] = False  # whether entries carry a log-vote

    @abc.abstractmethod
    def merge(self, view: View, kept: Tensor) -> Entries:
        """The entries of the kept slots, in tensors of their own: the view's may be overwritten with them.

        `kept` [B, K, N] int64: slots ascending, -1 behind a head's last one.
        """


@attrs.frozen
class Column:
    """One tensor of a store: what a slot holds under one name."""

    shape: tuple[int, ...]  # per slot; () for a scalar
    dtype: torch.dtype
    fill: float = 0.0

    @property
    def bytes_per_slot(self) -> int:
        """Bytes that one slot takes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class Codec(Plugin):
    """How entries are held: as they are, quantised, or in a latent basis."""

    stage = "store"

    @abc.abstractmethod
    def columns(self, geometry: Geometry, dtype: torch.dtype) -> dict[str, Column]:
        """The tensors that hold an entry, by name."""

    @abc.abstractmethod
    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Entries [..., D] and [..., Dv] to the columns, each [..., *shape]."""

    @abc.abstractmethod
    def decode(self, columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Columns back to keys [..., D] and values [..., Dv]; a plain codec returns them without copying."""


STAGES: dict[str, type[Plugin]] = {
    kind.stage: kind for kind in (Scorer, LayerAllocator, HeadAllocator, Selector, Merger, Codec)
}
