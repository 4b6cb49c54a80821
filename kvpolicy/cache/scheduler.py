"""When the layers of a cache are compressed, and the one step that does it."""

import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from kvpolicy.cache.compaction.batched_compaction import compact_layers
from kvpolicy.cache.compaction.write_back import fillings
from kvpolicy.cache.forward_step import ForwardStep
from kvpolicy.cache.request.prompt_tokens import PromptTokens
from kvpolicy.cache.storage.layer_storage import LayerStorage
from kvpolicy.cache.storage.packing import pack_layers
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.cache.trigger import entries_allowed
from kvpolicy.plan.compress.step import Compressed, compress
from kvpolicy.plan.plan import Plan
from kvpolicy.stages import View

Rows = tuple[int, ...]
_COPIED = 8  # of so many layers one may be shown as a copy


class Compressible(Protocol):
    """What the scheduler does with a layer."""

    scaling: float
    num_tokens: list[int]  # tokens of each row, pads excluded

    @property
    def storage(self) -> LayerStorage:
        """Its entries."""

    @property
    def limit(self) -> int:
        """Slots per KV head beyond which its storage does not grow."""

    @property
    def limit_behind_eviction(self) -> int:
        """The same where entries have just been evicted: of a joint budget a layer may have got the share of others."""

    @property
    def entries(self) -> list[int]:
        """Entries of each row in all KV heads, pads excluded."""

    def min_entries(self, num_tokens: Sequence[int]) -> list[int]:
        """Entries per KV head that each row must keep because the policy protects spans of it; 0 where it does not."""

    def due_after_prompt(self) -> list[int]:
        """Rows that hold too much once a prompt has come."""

    def close_gaps(self) -> None:
        """Drop the pads."""

    def before_compression(self) -> None:
        """Let scorers see what they have not seen of the newest tokens."""

    def after_compression(self, rows: Sequence[int]) -> None:
        """Drop what was held for the compression of some rows alone."""

    def before_packing(self) -> None:
        """Leave out what must not be packed."""

    def note_packing(self) -> None:
        """Something has been packed."""

    def view(self, rows: Sequence[int]) -> View:
        """The rows as plugins see them."""

    def budget(self, rows: Sequence[int]) -> list[int]:
        """Entries per KV head that each of the rows may keep."""

    def apply(
        self,
        rows: Sequence[int],
        result: Compressed,
        *,
        fills: bool = False,
        filling: Tensor | None = None,
        moved: bool = False,
    ) -> None:
        """Reduce the rows to what a compression left of them, which may have `moved` into place already.

        `fills` and `filling` as in `write_back`.
        """

    def note_compression(self, seconds: float) -> None:
        """Count a compression, and the host time that it took."""


class CompressionScheduler:
    """Decides for all layers of one cache, and compresses them: each when it has attended, or all when a step is over.

    A prompt is compressed layer by layer, so that no more than one layer holds all of it. While decoding, the slack of
    `every` slots lets layers wait for the end of the step: then the host waits for the device once, and one launch of
    each kernel is for all. Where layers compete for the budget, all wait, after a prompt too; so they do where a scorer
    reads prompts again, until the passes are over.
    """

    def __init__(self, plan: Plan, *, waits: bool, prompt: PromptTokens | None = None) -> None:
        self.plan = plan
        self.waits = waits  # whether somebody says when a step ends
        self._due: list[tuple[Compressible, Rows]] = []  # a layer may wait with several groups of rows
        self._packing: list[Compressible] = []  # layers that are packed when the step ends
        self._attended: list[Compressible] = []  # layers that compete, once they have attended in this forward
        self._decoding = True  # whether that forward is a decode step
        self.prompt = prompt  # ids of its tokens, where a scorer reads prompts again
        self.prompt_end: int | None = None  # how many tokens the prompt ends behind, where `generate` has told
        self._step: ForwardStep | None = None  # the forward in progress
        counts = plan.device.type != "cpu" and not plan.spec.merge.moves_only
        self.undone = torch.zeros(1, dtype=torch.int64, device=plan.device) if counts else None  # as in `compress`

    def step(self, num_tokens: list[int], seq_len: int, count: int, device: torch.device) -> ForwardStep:
        """The forward of `count` tokens behind `num_tokens` in each row, up to length `seq_len`; shared by layers."""
        step = self._step
        if step is None or step.count != count or step.seq_len != seq_len or step.before != num_tokens:
            step = self._step = ForwardStep.of(self.plan, num_tokens, seq_len, count, device)
        return step

    def attended(self, layer: Compressible, *, decoding: bool) -> None:
        """Note that a layer has taken and attended to the tokens of a forward; for layers that compete."""
        self._attended.append(layer)
        self._decoding = decoding

    def due(self, layer: Compressible, rows: Sequence[int], *, decoding: bool, immediately: bool = False) -> None:
        """Compress some rows of a layer, in which as many entries are protected, now or when the step ends."""
        if decoding and self.waits and not immediately:
            self._due.append((layer, tuple(rows)))
        else:
            self._compress([layer], rows, fills=decoding and self.plan.fills_holes)

    def pack(self, layer: Compressible, *, decoding: bool, immediately: bool = False) -> None:
        """Pack what is due in a layer, now or when the step ends and what is due to be compressed has been."""
        if decoding and self.waits and not immediately:
            self._packing.append(layer)
        else:
            self._pack([layer])

    def clear(self) -> None:
        """Forget who was due: the cache has been emptied."""
        self._due, self._packing, self._attended, self.prompt_end = [], [], [], None
        if self.prompt is not None:
            self.prompt.clear()

    def due_after_prompt(self, layers: Sequence[Compressible]) -> list[int]:
        """Rows that a prompt, which has come in all of these layers, leaves with too many entries."""
        if not self.plan.compresses_jointly:
            return sorted({row for layer in layers for row in layer.due_after_prompt()})
        self._decoding = False
        return self._rows_due(layers)

    def end(self) -> None:
        """The step is over for all layers."""
        self._step = None  # its positions are as long as a prompt
        due, self._due = self._due, []
        for kind in sorted({(rows, layer.scaling) for layer, rows in due}):
            alike = [layer for layer, rows in due if (rows, layer.scaling) == kind]
            self._compress(alike, kind[0], fills=self.plan.fills_holes)
        if self._packing:
            packing, self._packing = self._packing, []
            self._pack(packing)
        attended, self._attended = self._attended, []
        if attended:
            self._end_for_competing(attended)

    def _end_for_competing(self, layers: Sequence[Compressible]) -> None:
        """Compress the rows that hold too much in all layers; pack in each layer what has been put off till now."""
        rows = self._rows_due(layers) if len(layers) == self.plan.geometry.layers else []
        if rows:
            for layer in layers:
                layer.close_gaps()
            for alike in self.plan.budgets.protected_alike(layers[0].num_tokens, rows):
                self._compress(layers, alike, fills=self._decoding and self.plan.fills_holes)
        if self.plan.packs:
            self._pack(layers)

    def _rows_due(self, layers: Sequence[Compressible]) -> list[int]:
        heads, least = self.plan.geometry.kv_heads, layers[0].min_entries(layers[0].num_tokens)
        held = [sum(entries) for entries in zip(*(layer.entries for layer in layers), strict=True)]
        num_tokens = enumerate(layers[0].num_tokens)
        return [row for row, tokens in num_tokens if held[row] > self._allowed(tokens, least[row]) * heads]

    def _allowed(self, tokens: int, least: int) -> float:
        """Entries per KV head of all layers together; `least` as in `entries_allowed`."""
        plan, decoding = self.plan, self._decoding
        layers = range(plan.geometry.layers)
        return sum(entries_allowed(plan, layer, tokens, decoding=decoding, least=least) for layer in layers)

    def _compress(self, layers: Sequence[Compressible], rows: Sequence[int], *, fills: bool) -> None:
        started = time.perf_counter()
        plan = self.plan
        for layer in layers:
            layer.before_compression()
        shown = [[partial(layer.view, rows) for layer in group] for group in self._shown_together(layers)]
        budgets = torch.tensor([layer.budget(rows) for layer in layers], device=plan.device)
        tokens = torch.tensor([layers[0].num_tokens[row] for row in rows], device=plan.device)
        rest = iter(layers)
        for results in compress(
            plan.spec, plan.fusion, shown, budgets, tokens, packs=plan.packs_vectors, undone=self.undone
        ):
            self._reduce(list(islice(rest, len(results))), rows, results, fills=fills)
        spent = (time.perf_counter() - started) / len(layers)
        for layer in layers:
            layer.after_compression(rows)
            layer.note_compression(spent)

    def _shown_together(self, layers: Sequence[Compressible]) -> list[Sequence[Compressible]]:
        """Layers in groups whose views may exist at one time: copies of all would cost what the policy saves."""
        plan, count = self.plan, len(layers)
        if len({layer.scaling for layer in layers}) > 1:  # a launch has one scaling
            count = 1
        elif plan.views_are_copies:  # several save launches, of which kernels make a dozen a group
            count = count // _COPIED if not plan.packs and not plan.fusion.off else 1
        return [layers[first : first + max(1, count)] for first in range(0, len(layers), max(1, count))]

    def _pack(self, layers: Sequence[Compressible]) -> None:
        for layer in layers:
            layer.before_packing()
        packed = pack_layers([layer.storage for layer in layers], [layer.limit for layer in layers])
        for layer, done in zip(layers, packed, strict=True):
            if done:
                layer.note_packing()

    def _reduce(
        self, layers: Sequence[Compressible], rows: Sequence[int], results: Sequence[Compressed], *, fills: bool
    ) -> None:
        """Leave in some rows of the layers what a compression left of them; in kernels if they can."""
        moved = [False] * len(layers)
        storages = [layer.storage for layer in layers if isinstance(layer.storage, SegmentedStorage)]
        if self.plan.kernels and len(storages) == len(layers):
            limits = [layer.limit_behind_eviction for layer in layers]
            moved = compact_layers(storages, limits, rows, results, fills=fills)
        filling: Sequence[Tensor | None] = [None] * len(layers)
        if fills and not all(moved):
            filling = fillings([layer.storage for layer in layers], rows, results)
        for layer, result, own, done in zip(layers, results, filling, moved, strict=True):
            layer.apply(rows, result, fills=fills, filling=own, moved=done)
