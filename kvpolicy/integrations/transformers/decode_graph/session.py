"""Storages of fixed shapes for one batch at a time, and the steps that run on them."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy.cache.device_faults import DeviceFaults
from kvpolicy.cache.storage.storage_bytes import bytes_of
from kvpolicy.errors import CacheError
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer, require_batch
from kvpolicy.integrations.transformers.decode_graph.decode_step import Forward, Step, StepInputs
from kvpolicy.integrations.transformers.decode_graph.host_counts import HostCounts
from kvpolicy.integrations.transformers.decode_graph.runners import Mode, runner
from kvpolicy.integrations.transformers.decode_graph.static_layer import StaticLayer
from kvpolicy.plan.plan import Plan


class StaticSession:
    """Owns a storage and a window for each layer, which serve one cache after the other: captured steps stay valid.

    A cache is in as long as its layers hold their entries there. They are up to date on the host after every step, and
    may be read at any time. A layer that is to be changed otherwise takes its entries along first, into a storage of
    its own; so do the layers of the cache that is in when another one enters.
    """

    def __init__(self, plan: Plan, forward: Forward, mode: Mode, rows: int, capacities: Sequence[int]) -> None:
        self.plan, self.rows, self.capacities = plan, rows, tuple(capacities)
        with torch.inference_mode(mode=False):  # such tensors could not be written to outside of that mode
            self.faults = DeviceFaults(plan.device)
            self.inputs = StepInputs(len(capacities), rows, self.faults)
            self.layers = [
                StaticLayer(plan, ordinal, rows, capacity, self.inputs.clock, self.faults)
                for ordinal, capacity in enumerate(capacities)
            ]
        pool = torch.cuda.graph_pool_handle() if plan.device.type == "cuda" else None
        steps = (Step(forward, self.layers, self.inputs, compresses=compresses) for compresses in (False, True))
        self._step, self._step_and_compress = (runner(step, mode, pool) for step in steps)
        self._entered: list[weakref.ref[PolicyLayer]] = []  # layers of the cache that has entered last
        self._counts: HostCounts | None = None  # of that cache; None = its last step has failed
        self._written: tuple[object, object] | None = None  # what the device has been told

    def holds(self, cache: PolicyCache) -> bool:
        """Whether a cache is in, and its last step has gone well."""
        return self._counts is not None and self._layers_in() == cache.managed

    @property
    def nbytes(self) -> int:
        """Bytes beside what the layers that are in hold. What a CUDA graph allocates for itself is not known."""
        beside = [*vars(self.inputs).values(), *vars(self.faults).values()]
        for static, entered in zip(self.layers, self._entered, strict=False):
            beside += [*static.storage.in_step.index_tensors, *static.window.in_step[2:]]
            layer = entered()
            if layer is not None and layer.storage is not static.storage:  # it has left, and counts its own
                beside += [*static.in_step, *static.window.in_step]
        return bytes_of(beside)

    def enter(self, cache: PolicyCache) -> None:
        """Let a cache in; the one before, if it is still there, goes on in storages of its own."""
        self._vacate()
        layers = cache.managed
        with cache.integrity.change("move to static storage"):
            self._counts, self._entered = None, [weakref.ref(layer) for layer in layers]
            for static, layer in zip(self.layers, layers, strict=True):
                layer.enter_fixed_storage(static.storage, static.window)
                static.scaling, static.output_projection = layer.scaling, layer.output_projection
            self.inputs.clock.copy_(torch.tensor(layers[0].num_tokens, dtype=torch.int32))
            lengths = [[heads[0] for heads in layer.storage.lengths] for layer in layers]
            self._counts = HostCounts(self.plan, layers[0].num_tokens, lengths)

    def _vacate(self) -> None:
        """Let the cache that is in go on in storages of its own. Raises as `FixedStorage.require_agreement` does."""
        layers = self._layers_in()
        if not layers:
            return
        integrity = layers[0].integrity
        whole = integrity.is_whole
        with integrity.hand_over():
            for layer in layers:
                layer.leave_fixed_storage()
            if whole:
                for static in self.layers:
                    static.storage.require_agreement()

    def has_room(self) -> bool:
        """Whether the entries of the next step fit."""
        longest = (layer.storage.slots.longest for layer in self.layers)
        return all(count < size for count, size in zip(longest, self.capacities, strict=True))

    def run(self, tokens: Tensor, places: Tensor) -> Tensor:
        """One step of the cache that is in: logits [B, 1, vocabulary] of tokens [B, 1] at positions [B, 1].

        Raises CacheError, before any change, when the tokens are not one for each row.
        """
        counts, layers = self._counts, self._layers_in()
        if counts is None or not layers:
            raise CacheError("no cache is in static storage")
        require_batch(layers[0].stats.layer, self.rows, tokens, places)
        integrity = layers[0].integrity
        integrity.begin_step()
        self._counts = None  # until the step has gone well
        self.inputs.tokens.copy_(tokens)
        self.inputs.places.copy_(places)
        due = counts.append()
        if due:
            self._write(counts)
        logits = self._step_and_compress() if due else self._step()
        self.faults.poll()
        self._note(layers, counts, due=due)
        self._counts = counts
        integrity.end_step()
        return logits

    def _note(self, layers: Sequence[PolicyLayer], counts: HostCounts, *, due: bool) -> None:
        """Tell the layers what a step has done."""
        num_tokens = [tokens + 1 for tokens in layers[0].num_tokens]
        left: list[list[int] | None] = [None] * len(layers)
        if due:
            compressed = counts.layers_due
            counts.compress()
            left = [rows if changed else None for rows, changed in zip(counts.lengths, compressed, strict=True)]
        for static, layer, lengths in zip(self.layers, layers, left, strict=True):
            layer.note_static_step(static.storage, num_tokens, lengths)

    def _layers_in(self) -> list[PolicyLayer]:
        """The layers whose entries are here."""
        pairs = zip((entered() for entered in self._entered), self.layers, strict=False)
        return [layer for layer, static in pairs if layer is not None and layer.storage is static.storage]

    def _write(self, counts: HostCounts) -> None:
        """Tell the device what is due; what it knows already is not written again."""
        known = (counts.due, counts.budgets)
        if known != self._written:
            self._written = None
            self.inputs.due.copy_(torch.tensor(counts.due))
            self.inputs.budgets.copy_(torch.tensor(counts.budgets))
            self._written = known
