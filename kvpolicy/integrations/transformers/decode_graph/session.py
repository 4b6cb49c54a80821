"""Static storage for one batch at a time, and the steps that run on it."""

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from kvpolicy.cache.storage.storage_bytes import bytes_of
from kvpolicy.errors import CacheError
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer, require_batch
from kvpolicy.integrations.transformers.decode_graph.decode_step import Forward, Step, StepInputs
from kvpolicy.integrations.transformers.decode_graph.device_faults import DeviceFaults
from kvpolicy.integrations.transformers.decode_graph.host_counts import HostCounts
from kvpolicy.integrations.transformers.decode_graph.runners import Mode, runner
from kvpolicy.integrations.transformers.decode_graph.static_layer import StaticLayer
from kvpolicy.integrations.transformers.decode_graph.transfer import give_back, sync_back, take_over
from kvpolicy.plan.plan import Plan


class StaticSession:
    """Lends its storage to one cache after the other; captured steps keep it for all of them.

    While a cache is in, its layers' stores are this storage, and the host counts what the steps do. Whatever else is
    asked of the cache ends that: `leave` tells the layers what has happened, and the storage stays theirs until
    another cache comes in.
    """

    def __init__(self, plan: Plan, forward: Forward, mode: Mode, rows: int, capacities: Sequence[int]) -> None:
        self.plan, self.rows, self.capacities = plan, rows, tuple(capacities)
        with torch.inference_mode(mode=False):  # such tensors could not be written to outside of that mode
            self.faults = DeviceFaults(plan.device)
            self.inputs = StepInputs(len(capacities), rows, self.faults)
            self.layers = [
                StaticLayer(plan, ordinal, rows, capacity, self.inputs.clock)
                for ordinal, capacity in enumerate(capacities)
            ]
        pool = torch.cuda.graph_pool_handle() if plan.device.type == "cuda" else None
        steps = (Step(forward, self.layers, self.inputs, compresses=compresses) for compresses in (False, True))
        self._step, self._step_and_compress = (runner(step, mode, pool) for step in steps)
        self._layers_in: list[weakref.ref[PolicyLayer]] = []
        self._counts: HostCounts | None = None  # None = no cache is in
        self._written: tuple[object, object] | None = None  # what the device has been told

    def holds(self, cache: PolicyCache) -> bool:
        """Whether a cache is in."""
        return self._counts is not None and self._present_layers() == cache.managed

    @property
    def nbytes(self) -> int:
        """Bytes beside the entries: inputs, windows, counts. What a CUDA graph allocates for itself is not known."""
        layers = (tensor for layer in self.layers for tensor in layer.beside)
        return bytes_of([*vars(self.inputs).values(), *vars(self.faults).values(), *layers])

    def enter(self, cache: PolicyCache) -> None:
        """Let a cache in; the one before, if it is still there, goes on with storage of its own."""
        layers = cache.managed
        self.vacate(unless=layers)
        with cache.integrity.change("move to static storage"):
            self._layers_in = [weakref.ref(layer) for layer in layers]
            pairs = zip(self.layers, layers, strict=True)
            lengths = [take_over(static, layer, self.leave) for static, layer in pairs]
            self.inputs.clock.copy_(torch.tensor(layers[0].num_tokens, dtype=torch.int32))
            self._counts = HostCounts(self.plan, layers[0].num_tokens, lengths)

    def has_room(self) -> bool:
        """Whether the entries of the next step fit."""
        return self._counts is not None and self._counts.fit(self.capacities)

    def run(self, tokens: Tensor, places: Tensor) -> Tensor:
        """One step of the cache that is in: logits [B, 1, vocabulary] of tokens [B, 1] at positions [B, 1].

        Raises CacheError, before any change, when the tokens are not one for each row.
        """
        counts, layers = self._counts, self._present_layers()
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
        _note(layers, counts, due=due)
        self._counts = counts
        integrity.end_step()
        return logits

    def leave(self) -> None:
        """Let the cache go on without static steps; it takes the storage along until another one comes in."""
        counts, layers = self._counts, self._present_layers()
        if counts is None:
            return
        with _handing_over(layers):
            self._counts = None
            self.faults.flush()
            for static, layer, lengths in zip(self.layers, layers, counts.lengths, strict=False):
                sync_back(static, layer, counts.num_tokens, lengths)

    def vacate(self, unless: Sequence[PolicyLayer] = ()) -> None:
        """Give the storage of the cache that was in last back to this session alone."""
        self.leave()
        present = self._present_layers()
        if present and present != list(unless):
            with _handing_over(present):
                for static, layer in zip(self.layers, present, strict=True):
                    give_back(static, layer)
                self._layers_in = []

    def _present_layers(self) -> list[PolicyLayer]:
        """The layers that are in, or were last; none once one of them is gone."""
        present = [layer for layer in (one() for one in self._layers_in) if layer is not None]
        return present if len(present) == len(self._layers_in) else []

    def _write(self, counts: HostCounts) -> None:
        """Tell the device what is due; what it knows already is not written again."""
        known = (counts.due, counts.budgets)
        if known != self._written:
            self._written = None
            self.inputs.due.copy_(torch.tensor(counts.due))
            self.inputs.budgets.copy_(torch.tensor(counts.budgets))
            self._written = known


def _note(layers: Sequence[PolicyLayer], counts: HostCounts, *, due: bool) -> None:
    """Tell the layers what a step has done, as far as somebody may ask between steps."""
    entries = counts.averages
    left: list[float | None] = [None] * len(layers)
    if due:
        compressed = counts.layers_due
        counts.compress()
        left = [after if changed else None for after, changed in zip(counts.averages, compressed, strict=True)]
    for layer, before, after in zip(layers, entries, left, strict=True):
        layer.count_static_step(before, after)


def _handing_over(layers: Sequence[PolicyLayer]) -> AbstractContextManager[None]:
    """What fails halfway leaves a cache that nobody can go on with; none is left when there are no layers."""
    return layers[0].integrity.hand_over() if layers else nullcontext()
