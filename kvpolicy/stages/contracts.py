"""One contract per stage. A plugin is a frozen attrs class that keeps one of them and holds no run state."""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages.checking.calibrated import check_finite
from kvpolicy.stages.formats import AsIs, Format, Formats, Sample, Site
from kvpolicy.stages.geometry import Geometry
from kvpolicy.stages.prompt_passes import Pass, Prompt
from kvpolicy.stages.query_logits import QueryLogits
from kvpolicy.stages.selection_request import SelectionRequest
from kvpolicy.stages.view import View
from kvpolicy_kernels import Tile


class Plugin(abc.ABC):
    """What all stages share: the name used in YAML, and where the method was published."""

    stage: ClassVar[str]
    name: ClassVar[str]
    reference: ClassVar[str] = ""
    calibrated_by: ClassVar[tuple[str, ...] | None] = None
    """Parameters on which `calibrate` and `probes` depend, None = all; while these stay a calibration holds."""
    table_of_query_heads: ClassVar[bool] = False
    """Whether a table for `calibration_of` has a column for each query head, not for each KV head."""

    @property
    def calibrated(self) -> bool:
        """Whether it must know something that is measured on a model before: codecs, scorers and allocators may."""
        return False

    def probes(self, tokens: Tensor) -> Tensor:
        """The tokens that `calibrate` sees the model on, int64 [S, T], made of the `tokens` [S, T] of a text.

        By default the text itself. A plugin that measures how a model recalls something can repeat spans of the rows;
        nobody here knows a tokenizer. Deterministic: the same text gives the same tokens.
        """
        return tokens

    def calibrate(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """Per layer, what it will find in `site.calibration` (a codec) or `view.calibration`; deterministic."""
        return [{} for _ in samples]

    def calibration_of(self, table: Tensor, geometry: Geometry) -> list[dict[str, Tensor]]:  # noqa: ARG002
        """What `calibrate` gives, from a published table of a number for each managed layer and head.

        The table is float64 [L, K], or [L, H] for `table_of_query_heads`; its numbers are finite.

        Raises:
            ParameterError: the plugin reads no such table, or its numbers are none that it can mean.
        """
        raise ParameterError("reads no table of heads: it is measured on a text")

    def check_calibration(self, site: Site) -> None:
        """Look at `site.calibration` before it is used: it may come from a file that somebody has changed.

        By default, that all tensors are floating and finite. What a plugin knows besides (shapes, ranges, that columns
        are orthonormal) it checks itself. Called only where `calibrated`.

        Raises:
            ParameterError: this is not what `calibrate` gives for a layer of such a model.
        """
        for name, tensor in site.calibration.items():
            check_finite(name, tensor)


@attrs.frozen
class Needs:
    """What a plugin reads besides the entries; the runtime observes nothing that no plugin asks for."""

    queries: int = 0  # W, the last queries to keep
    attention: bool = False  # the mass each entry receives, summed over all queries
    forward_queries: int = 0  # how many of the newest queries of every forward `observe_forward` is shown
    # Tokens of a chunk: `Scorer.observe_chunk` is shown the queries of each chunk over its own entries, if
    # this is not 0. The token at position `chunk_start` begins the first one, and what is before it is in none.
    chunk: int = 0
    chunk_start: int = 0
    passes: bool = False  # whether a scorer reads prompts again: `Scorer.passes`
    rotary: bool = False  # whether keys are read as before rotation: models whose rotation is not known are refused
    # Whether what follows attention is read: models where it is not known are refused. `View.projection` has it, and a
    # scorer that reads prompts again is shown values behind it in each pass (`QueryLogits.output_norms`).
    output_projection: bool = False
    # Whether such a scorer is shown how long the hidden states are that attention modules are given for the tokens of a
    # pass (`QueryLogits.hidden_norms`); models whose modules are given none are refused.
    hidden_norms: bool = False
    regions: tuple[str, ...] = ()  # regions of the request by name (`View.in_region`): caches without them are refused


@attrs.frozen
class State:
    """One float32 that the cache carries for a plugin, per slot or per row; `fill` is what a new one holds."""

    name: str
    fill: float = 0.0


class ViewPlugin(Plugin):
    """A plugin that is shown views: scorers, allocators, selectors and mergers."""

    # Whether it looks at nothing that a layer has to itself: its number, what was calibrated for it, the weight behind
    # its attention. Scorers, selectors and mergers that say so may be shown small layers as rows of one view.
    layers_as_rows: ClassVar[bool] = False

    def needs(self) -> Needs:
        """What views must show of the model and its queries; `forward_queries` for observers, `passes` for scorers."""
        return Needs()


class Observer(ViewPlugin):
    """A plugin for which the runtime observes the model while it runs, and carries state."""

    def slot_state(self) -> tuple[State, ...]:
        """State carried per slot: moved with its entry in compaction, beam reordering and cropping."""
        return ()

    def observe_forward(self, query_logits: QueryLogits, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:  # noqa: ARG002
        """New values of slot state, each [B, K, T] float32, from one forward; called if `needs().forward_queries`."""
        return {}


class Scorer(Observer):
    """Gives every held entry a worth."""

    stage = "score"

    def observe(self, view: View) -> Mapping[str, Tensor]:  # noqa: ARG002 the default observes nothing
        """New values of the declared slot state, each [B, K, T] float32; `score` then sees them in the view."""
        return {}

    @abc.abstractmethod
    def score(self, view: View) -> Tensor:
        """Float32 [B, K, T], larger = keep. Only candidates are compared; other slots may hold any number."""

    def observe_chunk(self, query_logits: QueryLogits, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:  # noqa: ARG002
        """New values of slot state, each [B, K, T] float32, of the held entries of one chunk of consecutive tokens.

        Called if `needs().chunk`, once a chunk is complete, and for the newest, incomplete one before each compression.
        The logits are not causal: each query sees all entries of its chunk. Those of tokens that a head no longer holds
        see nothing. All queries of a chunk are shown, some of them at a time, so how they are cut must not matter; the
        state begins with what new entries hold.

        Where a policy does not compress while decoding, the chunk that a compression or a decode step finds incomplete
        ends there: its entries keep what they got, and tokens that follow see each other alone. Generated tokens are in
        no chunk; their state stays as it begins.
        """
        return {}

    def passes(self, prompt: Prompt) -> Sequence[Pass]:  # noqa: ARG002 the default reads nothing again
        """Token sequences to be read behind a prompt before it is compressed; asked if `needs().passes`.

        Each is forwarded by itself over all that the row holds, at the positions behind its last token, and dropped
        again. A row that holds no more than its budget is not asked: its entries keep the state that they have, also
        where decoding goes beyond the budget later, and its tokens are part of the next prompt that is read.
        """
        return ()

    def observe_pass(self, query_logits: QueryLogits, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:  # noqa: ARG002
        """New values of slot state, each [B, K, T] float32, of the entries that a pass shows.

        Called with some queries of a pass at a time, oldest first, so how they are cut must not matter. Rows whose pass
        is shorter have pads behind it, which see nothing.
        """
        return {}

    def in_any_order(self) -> bool:
        """Whether an entry scores the same in whichever slot it stands.

        If all scorers of a policy say so, compaction may fill the holes that evicted entries leave, and few entries
        move. `View.in_sequence` gives scores to a scorer that looks at neighbours.
        """
        return False

    def tile(self) -> "Tile | str":
        """How a GPU computes `score` tile by tile, so that the plan can fuse it; or why it cannot, in a few words."""
        return "has no tile function"


def _not_scored(_best: Tensor) -> Tensor:
    raise ValueError("nothing has been scored: what layers get follows from lengths alone")


@attrs.frozen(eq=False)
class AllocationRequest:
    """What an allocator divides: candidates, beside which what is protected stays anyway. All counts are int64.

    L layers, B rows, K KV heads. A layer allocator is asked before anything is scored: it sees each layer as one head
    (K = 1), whose counts are entries per KV head; `won` raises ValueError, and all is on the CPU.
    """

    room: Tensor  # [L, B, K], candidates of each head
    total: Tensor  # candidates to keep, at most the room: [B] in all layers and heads; for head allocators [L, B]
    protected: Tensor  # [L, B, K], entries that stay beside them
    tokens: Tensor  # [B], tokens that each sequence has had so far
    # For totals of the shape of `total`, how many of the best so many candidates each head owns, [L, B, K]; ties: lower
    # layer, then lower head, then earlier position.
    won: Callable[[Tensor], Tensor] = _not_scored
    # Where `reads_scores`, for each layer: float32 [B, K, T], -inf in slots that hold no candidate, in ascending order
    # of position; and bool [B, K, T], which slots hold one.
    scores: tuple[Tensor, ...] = ()
    candidates: tuple[Tensor, ...] = ()
    statistics: Tensor | None = None  # [L, B, K] float32, what `Allocator.statistics` gave of each layer

    @classmethod
    def of_lengths(cls, layers: int, budget: int, protected: int, tokens: Sequence[int]) -> "AllocationRequest":
        """What a layer allocator is asked about sequences of so many `tokens`; counts are entries per KV head.

        `budget` is what each layer keeps on average, the `protected` ones included; it is at most the tokens.
        """
        rows, shape = len(tokens), (layers, len(tokens), 1)
        held = torch.tensor(list(tokens))
        room = (held - protected)[:, None].expand(shape)
        total = torch.full((rows,), layers * (budget - protected), dtype=torch.int64)
        return cls(room, total, torch.full(shape, protected, dtype=torch.int64), held)

    def tensors(self) -> dict[str, Tensor]:
        """All that an allocator is shown, by name."""
        named = {name: getattr(self, name) for name in ("room", "total", "protected", "tokens")}
        named |= {f"scores of layer {layer}": scores for layer, scores in enumerate(self.scores)}
        named |= {} if self.statistics is None else {"statistics": self.statistics}
        return named | {f"candidates of layer {layer}": inside for layer, inside in enumerate(self.candidates)}


class Allocator(ViewPlugin):
    """Divides a budget. What it divides it over is its stage: layers, the heads of a layer, or both."""

    ragged: ClassVar[bool] = True  # whether heads of a layer can end up with different lengths
    # Whether all that may be kept is kept. Only one that is ragged, and divides by scores, may keep less.
    exact: ClassVar[bool] = True
    reads_window: ClassVar[bool] = False  # whether `statistics` reads queries: some plugin must then observe them

    def statistics(self, view: View) -> Tensor | None:  # noqa: ARG002 the default needs nothing else
        """What it must know of each head of a layer beside scores, float32 [B, K]; None = nothing.

        Asked before it allocates, while keys and values can still be looked at. What it was calibrated with is in
        `view.calibration`. Not asked of layer allocators.
        """
        return None

    @property
    def reads_scores(self) -> bool:
        """Whether it looks at single scores; `won` is told anyway, and a GPU need not look twice for it."""
        return False

    @abc.abstractmethod
    def allocate(self, request: AllocationRequest) -> Tensor:
        """Candidates to keep in each head, int64 [L, B, K]: sums of exactly `request.total`, none above its room.

        Sums are at most the total where the allocator is not `exact`; all candidates stay where the total is all of
        them. Rows never influence each other.
        """


class LayerAllocator(Allocator):
    """Divides the budget over the layers; what each gets follows from the length of the sequence alone.

    All layers have the same room, and the total is a multiple of their number.
    """

    stage = "allocate.layers"
    ragged = False
    follows_length: ClassVar[bool] = True  # whether equal totals are divided otherwise for sequences of other lengths


class HeadAllocator(Allocator):
    """Divides the budget of each layer over its KV heads. Layers never influence each other."""

    stage = "allocate.heads"


class JointAllocator(Allocator):
    """Divides the budget over all layers and heads at once, in place of a layer and a head allocator.

    Every compression is one of the whole model: a prompt is compressed when its last layer has attended.
    """

    stage = "allocate.joint"


class Selector(ViewPlugin):
    """Chooses which candidates stay."""

    stage = "select"
    best: ClassVar[bool] = False  # whether it keeps each head's highest scores, nothing else: the plan can fuse that

    def second_scores(self, view: View) -> Tensor | None:  # noqa: ARG002 the default needs nothing else
        """What the selector must know of every entry beside its score; None = nothing.

        Float32 [B, K, T], or [B, K, n, T] where that is n numbers. Asked before it selects, while keys and values can
        still be looked at; held until then, for all layers that are compressed together.
        """
        return None

    @abc.abstractmethod
    def select(self, request: SelectionRequest) -> Tensor:
        """Bool [B, K, T]: the candidates to keep, as many of each head as `request.counts` says.

        Rows never influence each other. Ties: the higher score, then the earlier position (the lower slot). Candidates
        whose score is NaN come last, also those that are chosen for other reasons than their score.
        """


@attrs.frozen(eq=False)
class Entries:
    """What a layer holds after a compression, N slots per head, `-1` padded like `kept`."""

    keys: Tensor  # [B, K, N, D]
    values: Tensor  # [B, K, N, Dv]
    log_votes: Tensor | None = None  # [B, K, N] float32
    changed: Tensor | None = None  # [B, K, N] bool, keys or values differ from the view's; None = none does
    slot_state: Mapping[str, Tensor] = attrs.field(factory=dict)  # [B, K, N] float32; what is left out moves as it is
    row_state: Mapping[str, Tensor] = attrs.field(factory=dict)  # [B] float32; what is left out stays as it is


class Merger(Observer):
    """Decides what becomes of evicted entries."""

    stage = "merge"
    moves_only: ClassVar[bool] = False  # whether kept entries stay bit for bit as they are: `merge` is then not needed
    votes: ClassVar[bool] = False  # whether entries carry a log-vote, added to their logits in every attention
    reads_window: ClassVar[bool] = False  # whether it reads `view.logits`: some plugin must then observe queries

    def row_state(self) -> tuple[State, ...]:
        """State carried per row of the batch."""
        return ()

    @abc.abstractmethod
    def merge(self, view: View, kept: Tensor) -> Entries:
        """The entries of the kept slots, in tensors of their own: the view's may be overwritten with them.

        `kept` [B, K, N] int64: slots ascending, -1 behind a head's last one. The view shows the merger's own state.
        """


class Codec(Plugin):
    """How entries are held: as they are, quantised, or in a latent basis."""

    stage = "store"

    @property
    def joint(self) -> bool:
        """Whether all KV heads of a layer must hold equally many entries."""
        return False

    @abc.abstractmethod
    def formats(self, site: Site) -> Formats:
        """How one layer of one model holds its keys and values.

        Raises:
            ParameterError: the parameters do not go with the geometry, or the rotation is not known.
        """


@attrs.frozen(eq=False)
class ReadRequest:
    """One decode step, as a reader sees it: the newest query of each row, and what is held.

    Along T, the entries of a head stand in ascending order of position; empty slots come last and have position -1.
    """

    queries: Tensor  # [B, H, D] post-RoPE
    query_positions: Tensor  # [B] int
    positions: Tensor  # [B, K, T] int
    geometry: Geometry
    layer: int = 0  # ordinal among the managed layers
    format: Format = attrs.field(factory=AsIs)  # of the keys
    packed_lengths: Tensor | None = None  # [B, K] int64, the oldest slots that are packed; None = none is
    packed: Mapping[str, Tensor] = attrs.field(factory=dict)  # columns of the keys, [B, K or 1, groups, *shape]
    pages: Mapping[str, Tensor] = attrs.field(factory=dict)  # columns of the reader's own, [B, K, pages, *shape]
    # Where `summarises_newest`: columns of the page of each head's newest entry, [B, K, 1, *shape].
    newest_page: Mapping[str, Tensor] = attrs.field(factory=dict)
    scaling: float | None = None  # the attention module's own factor on q·k; None = 1 / sqrt(D)


class Reader(Plugin):
    """Chooses, for each decode step and without destroying anything, which held entries are attended."""

    stage = "read"
    stores: ClassVar[tuple[str, ...]] = ()  # the codecs that it can read; empty = any
    # Whether it looks at the page of the newest entry, too, complete or not: it is then made for each step, with the
    # newest key in all of its free places.
    summarises_newest: ClassVar[bool] = False

    def pages(self, site: Site) -> Format | None:  # noqa: ARG002 the default keeps none
        """What is kept per page of `group_size` consecutive keys; None = nothing. Only its `encode` is used.

        A page is made when its last entry has come, and made anew where an eviction changed its entries.
        """
        return None

    @abc.abstractmethod
    def choose(self, request: ReadRequest) -> Tensor | None:
        """Slots to read, int64 [B, K, n], ascending, -1 behind a head's last one; None = all."""


STAGES: dict[str, type[Plugin]] = {
    kind.stage: kind
    for kind in (Scorer, LayerAllocator, HeadAllocator, JointAllocator, Selector, Merger, Codec, Reader)
}
