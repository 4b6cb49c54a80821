"""The cache of a whole model: managed layers where there is full attention, the model's own layers elsewhere."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache

from kvpolicy.cache.integrity import Integrity
from kvpolicy.cache.layer_state import NewStorage
from kvpolicy.cache.request.prompt_tokens import PromptTokens
from kvpolicy.cache.request.regions import Regions, Spans
from kvpolicy.cache.request.request_spans import RequestSpans
from kvpolicy.cache.scheduler import CompressionScheduler
from kvpolicy.cache.stats import LayerStats
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.errors import CacheError, shown
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer, require_batch
from kvpolicy.integrations.transformers.cache_owner import CacheOwner
from kvpolicy.integrations.transformers.logical_layer import repeated, require_rows, selected
from kvpolicy.integrations.transformers.saving import cache_file
from kvpolicy.integrations.transformers.saving import stock_layers as stock
from kvpolicy.integrations.transformers.torch_modes import exact, exactly
from kvpolicy.plan.plan import Plan


class PolicyCache(DynamicCache):
    """A cache for one batch of sequences, to be passed as `past_key_values` to a model with the policy attached.

    Layers with a sliding window, which are bounded already, stay as the model's library makes them.

    The cache is whole or refused: after a forward, or another change, that did not reach its end, every further change
    raises CacheError until `reset`. Lengths, reports and copies can still be had.
    """

    owner: CacheOwner | None = None  # of the attachment that it was made for

    def __init__(
        self,
        plan: Plan,
        config: PretrainedConfig,
        regions: Regions | None = None,
        tokens: object = None,
        new_storage: NewStorage = SegmentedStorage,
    ) -> None:
        """`regions` and `tokens` are those of the request; tokens count only where a scorer reads prompts again.

        `new_storage` makes the place where the entries of a managed layer are held.
        """
        super().__init__(config=config)
        self.plan = plan
        self._config, self._new_storage = config, new_storage
        self.stock_bytes: dict[int, int] = {}  # of each layer that is none of ours, as it was when it last changed
        self.integrity = Integrity(range(len(self.layers)))
        self.prompt = PromptTokens(tokens) if plan.passes else None
        self._scheduler = CompressionScheduler(plan, waits=True, prompt=self.prompt)
        self.spans = RequestSpans(plan.spec.protect, regions, plan.needs.regions)
        for ordinal, layer in enumerate(plan.geometry.managed):
            self.layers[layer] = PolicyLayer(plan, ordinal, self._scheduler, self.integrity, self.spans, new_storage)

    @property
    def managed(self) -> list[PolicyLayer]:
        """The layers that the policy bounds."""
        return [layer for layer in self.layers if isinstance(layer, PolicyLayer)]

    @property
    def _stock(self) -> list[tuple[int, Any]]:
        """The other layers, which are those of the model's library, and their indices."""
        return [(index, layer) for index, layer in enumerate(self.layers) if not isinstance(layer, PolicyLayer)]

    @property
    def stats(self) -> list[LayerStats]:
        """What happened in each managed layer so far."""
        return [layer.stats for layer in self.managed]

    def count(self) -> None:
        """Bring `stats` and `stock_bytes` up to date."""
        counted: set[int] = set()
        for layer in self.managed:
            layer.count(counted)
        self.stock_bytes.update({index: stock.bytes_of_stock(layer) for index, layer in self._stock})

    @property
    def rows(self) -> int:
        """Rows of the batch that the cache holds; 0 before the first forward."""
        return max((_rows_of(layer) for layer in self.layers), default=0)

    # -- forwards ----------------------------------------------------------------------------------------------

    def begin_forward(self) -> None:
        """Say that a forward with this cache is about to begin, and that `end_forward` will follow when it returns.

        Raises CacheError when an earlier forward, or another change, did not reach its end, or after `retire`. Without
        these two calls a forward begins with the first `update` and is over when the last layer has attended.
        """
        self.integrity.begin_forward()

    def end_forward(self) -> None:
        """Say that the forward has returned. Raises CacheError when it did not attend in every layer that it updated.

        Layers that waited for the end of the step are compressed now, if the model's last layer was left out.
        """
        with exact(self.plan.device.type):
            self._scheduler.end()
        self.integrity.end_forward()

    def due_after_prompt(self) -> list[int]:
        """Rows that the prompt, which has come in all layers, leaves with more than they may hold."""
        with exact(self.plan.device.type):
            return self._scheduler.due_after_prompt([layer for layer in self.managed if layer.is_initialized])

    def expect_prompt(self, end: int | None) -> None:
        """Say that the prompt of a generation ends behind `end` tokens: what follows in its forward are candidates.

        Where a scorer reads prompts again, all forwards until then are one prompt. Otherwise each forward of more than
        one token is one by itself.
        """
        self._scheduler.prompt_end = end
        if self.prompt is not None:
            self.prompt.expect(end)

    def retire(self, reason: str) -> None:
        """Refuse every further change with CacheError(reason); lengths, reports and copies can still be had."""
        self.integrity.retire(reason)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, K, q, D] to a layer, and return what its attention is to be given.

        Raises CacheError, before any change, when the cache is not whole or holds another number of rows.
        """
        layer: Any = self.layers[layer_idx]
        if isinstance(layer, PolicyLayer):
            updated: tuple[Tensor, Tensor] = layer.update(key_states, value_states, *args, **kwargs)
            return updated
        self.integrity.require_ready(layer_idx)
        if _rows_of(layer):
            require_batch(layer_idx, _rows_of(layer), key_states, value_states)
        self.integrity.begin_update(layer_idx)
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        self.stock_bytes[layer_idx] = stock.bytes_of_stock(layer)
        self.integrity.end_update(layer_idx)  # its attention is out of our sight
        return keys, values

    # -- other changes -----------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Empty the cache, which can then be used like a new one, whatever had happened to it."""
        with self.integrity.renewal():
            self._scheduler.clear()
            self.spans.clear()
            for layer in self.managed:
                layer.empty()
            for _, other in self._stock:
                other.reset()
            self._forget_recording()

    def activate_past_recording(self) -> None:
        """From now on evict inside `crop` only: assisted decoding verifies candidates and rolls some back.

        Raises UnsupportedCallError, before any change, where all layers compete for the budget.
        """
        for layer in self.managed:
            layer.require_recordable()
        with self._changing("activate_past_recording"):
            for layer in self.managed:
                layer.record()
            for _, other in self._stock:
                if hasattr(other, "activate_past_recording"):
                    other.activate_past_recording()

    def stop_recording(self) -> None:
        """Leave the mode that assisted decoding switched on: make up for what it put off, then evict when it is due."""
        if any(layer.record_past for layer in self.managed):
            self.crop(0)
        with self._changing("stop_recording"):
            self._forget_recording()

    def _forget_recording(self) -> None:
        for layer in self.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    @exactly
    def crop(self, tokens_to_remove: int) -> None:
        """Undo the newest `-tokens_to_remove` tokens; a positive number is the length to return to.

        Raises CacheError, before any layer has changed, when one cannot.
        """
        self.integrity.require_whole()
        counts = [layer.undone_by(tokens_to_remove) for layer in self.managed]
        count = max(counts, default=0)
        for index, other in self._stock:
            stock.require_croppable(index, other, count)
        with self._changing("crop"):
            for layer in self.managed:
                layer.remove(count if layer.is_initialized else 0)
            for _, other in self._stock:
                if _rows_of(other) and (count or getattr(other, "record_past", False)):
                    other.crop(-count)
            if self.prompt is not None:
                self.prompt.crop(self.get_seq_length(), count)
            self._scheduler.end()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row `beam_idx[b]` was. Raises CacheError, before any change, for rows not held."""
        self._move_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, beside each other."""
        self._move_rows(repeated(self.rows, repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows named. Raises CacheError, before any change, for rows not held."""
        self._move_rows(selected(self.rows, indices) if self.rows else [])

    def _move_rows(self, rows: list[int]) -> None:
        self.integrity.require_whole()
        if not self.rows:
            return
        require_rows(self.rows, rows)
        with self._changing("move of rows"):
            self.spans.select_rows(rows)
            if self.prompt is not None:
                self.prompt.select_rows(rows)
            for layer in self.managed:
                layer.move_rows(rows)
            for _, other in self._stock:
                stock.select_rows(other, rows)

    @contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        """The body is one change of all layers."""
        with self.integrity.change(name):
            for layer in self.managed:
                layer.prepare()
            yield

    def check_integrity(self) -> None:
        """Raise CacheError when a layer contradicts itself; for tests and debugging."""
        for layer in self.managed:
            layer.state.check_integrity()

    def add_regions(self, regions: "Regions | Spans | Sequence[Spans]") -> None:
        """Name spans of tokens that came after the first prompt, or are about to come: results of tools, for example.

        Tokens of each row are counted from the beginning of its sequence, without pads. Spans join a region that has
        their name, and begin a new one otherwise. Raises CacheError as `fork` does, and RegionError, before any
        change, for what `Regions.of` refuses, for other rows, and where spans overlap.
        """
        self._require_settled("given regions")
        self.spans.add(Regions.of(regions), self.rows)

    # -- copies ------------------------------------------------------------------------------------------------

    @exactly
    def fork(self, rows: Sequence[int] | None = None) -> "PolicyCache":
        """A new cache of the same attachment with the rows named, in that order; each may be named several times.

        By default all rows. It shares no storage with this one, and goes on as this one would with these rows. Its
        report counts what it holds; steps and times are counted from now on.

        Raises CacheError, before anything is done, when this cache is not whole, is empty, waits for `crop` to undo
        candidates of assisted decoding, or does not hold such rows.
        """
        self._require_settled("forked")
        chosen = list(range(self.rows)) if rows is None else _require_listed(rows)
        require_rows(self.rows, chosen)
        regions = self.spans.regions
        other = PolicyCache(
            self.plan, self._config, None if regions is None else regions.select(chosen), new_storage=self._new_storage
        )
        other.spans.go_on_as(self.spans, chosen)
        if self.prompt is not None and other.prompt is not None:
            other.prompt.go_on_as(self.prompt, chosen)
        with self.integrity.unmoved:
            for layer, fresh in zip(self.managed, other.managed, strict=True):
                fresh.restore(layer.state.selected(chosen) if layer.is_initialized else layer.state.copied())
        for index, layer in self._stock:
            stock.copied(index, layer, other.layers[index], chosen, self.plan.dtype)
        other.resume()
        if self.owner is not None:
            self.owner.made(other)
        return other

    @exactly
    def save(self, path: "str | os.PathLike[str]", tokenizer: object = None) -> None:
        """Write all that the cache holds to a safetensors file, for `attachment.load_cache`.

        The file has digests of the policy, the model's weights, and `tokenizer`, if one is given; it is there whole or
        not at all. Raises CacheError as `fork` does, SavedCacheError when the file cannot be written, ParameterError
        when `tokenizer` is none.
        """
        self._require_settled("saved")
        if self.owner is None:
            raise CacheError("the cache belongs to no attachment yet, so its model is not known: use it there first")
        digest = self.owner.model_digest()
        with self.integrity.unmoved:
            cache_file.write(self, path, digest, tokenizer)

    def resume(self) -> None:
        """Go on with the states that have been put into the layers of a new cache."""
        self.integrity.resume(index for index, layer in enumerate(self.layers) if _rows_of(layer))
        self.count()

    def _require_settled(self, what: str) -> None:
        self.integrity.require_whole()
        if not self.rows:
            raise CacheError(f"the cache is empty: it can be {what} once it has seen tokens")
        if any(not layer.recording.is_empty for layer in self.managed):
            raise CacheError(f"candidates of assisted decoding are pending: the cache can be {what} after crop()")
        with self.integrity.unmoved:
            for layer in self.managed:
                layer.require_agreement()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy belongs to the attachment of the first; one that is unpickled, to the first that uses it."""
        self.__dict__.update(state)
        if self.owner is not None:
            self.owner.adopt(self)

    def __iter__(self) -> Any:
        raise TypeError("a compressed cache has no plain keys and values to iterate over; see PolicyCache.managed")


def _rows_of(layer: Any) -> int:
    """Rows that a layer holds, 0 when it is empty."""
    return len(layer.num_tokens) if isinstance(layer, PolicyLayer) else stock.rows_of(layer)


def _require_listed(rows: Iterable[int]) -> list[int]:
    listed = list(rows)
    if any(isinstance(row, bool) or not isinstance(row, int) for row in listed):
        raise CacheError(f"rows must be whole numbers: {', '.join(map(shown, listed))}")
    return listed
