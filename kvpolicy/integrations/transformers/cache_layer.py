"""The cache layer: what `generate` sees as one layer's cache, bounded by a plan."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import attrs
import torch
from torch import Tensor

from kvpolicy.attention.attend import attend, observe_only
from kvpolicy.attention.observe_chunks import observe_complete_chunks, observe_newest_chunk
from kvpolicy.attention.read_request import chosen_by, read_request
from kvpolicy.cache.compaction.write_back import build_view, write_back
from kvpolicy.cache.forward_step import ForwardStep
from kvpolicy.cache.integrity import Integrity
from kvpolicy.cache.layer_state import LayerState, NewStorage
from kvpolicy.cache.observation_window import ObservationWindow
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.cache.recording import RecordedTokens, Recording
from kvpolicy.cache.request.request_spans import RequestSpans
from kvpolicy.cache.scheduler import CompressionScheduler
from kvpolicy.cache.stats import LayerStats
from kvpolicy.cache.storage.fixed_storage import FixedStorage
from kvpolicy.cache.storage.layer_storage import LayerStorage
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.cache.storage.storage_bytes import bytes_of
from kvpolicy.cache.trigger import entries_allowed
from kvpolicy.errors import CacheError, UnsupportedCallError, UnsupportedModelError
from kvpolicy.integrations.transformers.calls.padding_mask import NewTokens
from kvpolicy.integrations.transformers.logical_layer import LogicalLayer, require_rows
from kvpolicy.integrations.transformers.torch_modes import exactly, taking_states
from kvpolicy.plan.compress.step import Compressed
from kvpolicy.plan.plan import Plan
from kvpolicy.stages import View


def _of_state(name: str) -> Any:
    """The field of the layer's state that has the name, read and written. Many are read for every token: in C."""

    def write(layer: Any, value: Any) -> None:
        setattr(layer.state, name, value)

    return property(attrgetter(f"state.{name}"), write)


class PolicyLayer(LogicalLayer):
    """Storage of one layer. The lengths it reports are logical: tokens seen, whatever is still held.

    One forward is `update` (append), then, from the attention function that alone sees the queries, `place_tokens`
    (which of the new tokens are pads) and `finish_forward` (observe, compress). The keys that `update` returns carry
    the layer, as attribute `kvpolicy_layer`.
    """

    state: LayerState  # all that tokens change; its fields are shown as attributes
    storage: LayerStorage = _of_state("storage")
    window: ObservationWindow = _of_state("window")
    chunk_window: ObservationWindow = _of_state("chunk_window")
    row_state: dict[str, Tensor] = _of_state("row_state")
    num_tokens: list[int] = _of_state("num_tokens")
    seq_len: int = _of_state("seq_len")
    compressed: bool = _of_state("compressed")
    padded: bool = _of_state("padded")
    in_order: bool = _of_state("in_order")
    rollback_limit: int = _of_state("rollback_limit")
    scaling: float = _of_state("scaling")
    record_past: bool = _of_state("record_past")
    expects_prompt: bool = _of_state("expects_prompt")

    def __init__(
        self,
        plan: Plan,
        ordinal: int,
        scheduler: CompressionScheduler | None = None,
        integrity: Integrity | None = None,
        spans: RequestSpans | None = None,
        new_storage: NewStorage = SegmentedStorage,
    ) -> None:
        """`scheduler`, `integrity` and `spans` are those of the cache; without them the layer is a cache by itself.

        `new_storage` makes the place where entries are held.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.changes = 0  # forwards, rollbacks and moves of rows that this layer itself has done
        self.plan = plan
        self.ordinal = ordinal
        self._new_storage = new_storage
        self.scheduler = scheduler or CompressionScheduler(plan, waits=False)
        self.stats = LayerStats(plan.geometry.managed[ordinal])
        self.integrity = integrity or Integrity([self.stats.layer])
        self.spans = spans or RequestSpans(plan.spec.protect, read=plan.needs.regions)
        self._protects_spans = plan.spec.protect.by_place
        self._wants_order = plan.wants_order(ordinal)
        self._grows_unseen = plan.selective or bool(plan.passes)  # by numbers on the device, by token ids
        self.output_projection: Callable[[], Tensor] | None = None  # the weight that follows its attention
        self.empty()

    def reset(self) -> None:
        with self.integrity.renewal():
            self.scheduler.clear()
            self.spans.clear()
            self.empty()

    @exactly
    def empty(self) -> None:
        """Do what `reset` does, as part of a change of the whole cache."""
        self.is_initialized = False
        self.state = self.new_state(0)
        self._num_new = 0  # tokens appended whose attention has not run yet
        self._step: ForwardStep | None = None  # their forward, until the layer has done with it
        self._resized = True  # whether bytes have to be counted anew
        self.recording = Recording()  # what a rollback may still undo
        self._new: tuple[Tensor, Tensor] | None = None  # keys and values of this forward, while they are recorded
        self._recorded: RecordedTokens | None = None  # the tokens of this forward, while they are recorded
        self._read: Tensor | None = None  # how many entries a reader has chosen for the queries of this forward
        self._observed = False  # whether observers have seen the queries of this forward

    # -- one forward -------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make an empty store. Raises UnsupportedModelError when the entries do not have the planned shape."""
        self._require_shape(key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        empty = self.new_state(key_states.shape[0])
        empty.record_past, empty.expects_prompt = self.record_past, self.expects_prompt
        self.state, self.is_initialized, self._resized = empty, True, True

    def new_state(self, rows: int) -> LayerState:
        """That of a layer like this one, before any token."""
        return LayerState.empty(self.plan, self.ordinal, rows, self.plan.device, self._new_storage)

    def _require_shape(self, key_states: Tensor, value_states: Tensor) -> None:
        geometry, dtype = self.plan.geometry, self.plan.dtype
        expected = (geometry.kv_heads, geometry.head_dim)
        for states in (key_states, value_states):
            shape = (states.shape[1], states.shape[3])
            if shape != expected or states.dtype != dtype:
                raise UnsupportedModelError(
                    f"layer {self.stats.layer}: (KV heads, head dim) must be {expected} in {dtype}: "
                    f"{shape} in {states.dtype}"
                )

    @taking_states
    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append post-RoPE [B, K, q, D]; returns all entries until the first compression, then the new ones.

        Raises CacheError, before any change, when the cache is not whole or holds another number of rows.
        """
        self.integrity.require_ready(self.stats.layer)
        if self.is_initialized:
            require_batch(self.stats.layer, len(self.num_tokens), key_states, value_states)
        else:
            self._require_shape(key_states, value_states)
            self.spans.begin(key_states.shape[0])
        if self.plan.passes:
            self.integrity.require_announced(self.stats.layer)
        self.integrity.begin_update(self.stats.layer)
        self.prepare()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        state, count = self.state, key_states.shape[2]
        self._num_new = count
        step = self.scheduler.step(state.num_tokens, state.seq_len + count, count, self.device)
        # An allocator is asked, and may fail, before anything changes.
        limit = self._limit_at(step.seq_len) if self._protects_spans else step.limits[self.ordinal]
        self._step, state.seq_len = step, step.seq_len
        if state.storage.append(key_states, value_states, step.by_head, limit):
            self._resized = True
        self._new = (key_states, value_states) if state.record_past else None
        keys, values = (key_states, value_states) if state.compressed else state.storage.all_states()
        keys = keys.view(keys.shape)  # a fresh alias, which can carry an attribute
        keys.kvpolicy_layer = self  # type: ignore[attr-defined]
        return keys, values

    @exactly
    def place_tokens(self, new_tokens: NewTokens | None) -> Tensor:
        """Positions of the appended tokens, [B, q], now that it is known which are pads (position -1).

        Raises CacheError when the tokens have been attended to already, or when the mask is of other rows.
        """
        self.integrity.require_updated(self.stats.layer)
        state, step = self.state, self._step
        if step is None:  # there is one since the update
            raise CacheError(f"layer {self.stats.layer}: no forward is in progress")
        if new_tokens is not None:
            if tuple(new_tokens.valid.shape) != (len(state.num_tokens), step.count):
                raise CacheError(
                    f"layer {self.stats.layer}: the mask is of {tuple(new_tokens.valid.shape)} (rows, tokens), "
                    f"the forward of {(len(state.num_tokens), step.count)}"
                )
            if new_tokens.padded:
                self._step = step = step.with_pads(new_tokens.valid, new_tokens.counts)
                state.storage.replace_newest_positions(step.by_head)
                state.padded = True
        state.num_tokens = step.after
        self._num_new = 0
        return step.positions

    @exactly
    def attend(self, batch: QueryBatch, dropout: float = 0.0) -> Tensor | None:
        """Attention over what is held and read, [B, H, q, D]; None when that is all there ever was: a stock call."""
        self.state.scaling = batch.scaling
        if self._new is not None:
            self._recorded = RecordedTokens(*self._new, batch)
            return self.recording.attend(self, self._recorded, self.scheduler.prompt_end, dropout)
        slots = self._chosen(batch) if self.plan.selective else None
        if slots is not None:
            self._read = _chosen_on_average(slots)
        if not self.state.compressed and slots is None:
            return None
        self._observed = True
        return self._attended(batch, slots, dropout, observed=True)

    def attended(self, batch: QueryBatch, dropout: float, *, observed: bool) -> Tensor:
        """Attention over what is held and read, [B, H, q, D]; `observed` says whether observers see it."""
        slots = self._chosen(batch)
        if batch.queries.shape[2] == 1:
            self.stats.read_by_step(self.storage.average if slots is None else _chosen_on_average(slots))
        return self._attended(batch, slots, dropout, observed=observed)

    def _attended(self, batch: QueryBatch, slots: Tensor | None, dropout: float, *, observed: bool) -> Tensor:
        observers, kernels = self.plan.observers if observed else (), self.plan.kernels
        return attend(self.storage, batch, slots, observers, pads=self.padded, dropout=dropout, kernels=kernels)

    def _chosen(self, batch: QueryBatch) -> Tensor | None:
        """The slots [B, K, n] that the reader picks for a decode step; None = all."""
        if batch.queries.shape[2] > 1 or not self.plan.selective:
            return None
        prompt = self.scheduler.prompt
        if prompt is not None and prompt.is_prompt:  # one token of it
            return None
        return chosen_by(self.plan.spec.read, read_request(self.plan, self.storage, batch, self.ordinal))

    def _spread(self, positions: Tensor) -> Tensor:
        return positions[:, None].expand(-1, self.plan.geometry.kv_heads, -1)

    @exactly
    def finish_forward(self, batch: QueryBatch) -> None:
        """After attention: observe the queries and compress the rows that are due; later, if it may be undone."""
        self.state.scaling = batch.scaling
        step, self._step = self._step, None
        if self._recorded is not None:
            self.recording.note_forward(self, self._recorded, self.scheduler.prompt_end)
            self._recorded = self._new = None
            self._sample()
        else:
            self._observe(batch)
            decoding, held = batch.queries.shape[2] == 1, self.storage.average
            if decoding:
                self.stats.read_by_step(held if self._read is None else self._read)
            if self._resized or self._grows_unseen:
                self._sample()
            else:
                self.stats.advance(self.seq_len, held)
            self._compress_and_pack(decoding=decoding, step=step)
        self._observed, self._read = False, None
        self.integrity.end_update(self.stats.layer, self.scheduler.end)

    def would_compress(self) -> bool:
        """Whether attention may be over less than all tokens: entries are packed, chosen, or about to be evicted."""
        if self._wants_order:
            return True
        decoding = self._num_new == 1 or (self.record_past and not self.expects_prompt)
        if self._step is not None and not self._may_be_due(self._step, decoding=decoding):
            return False
        ahead = [num_tokens + self._num_new for num_tokens in self.num_tokens]
        return bool(self._due(ahead, decoding=decoding))

    # -- compression -------------------------------------------------------------------------------------------

    def _observe(self, batch: QueryBatch) -> None:
        if self.plan.chunk_observers:
            self._observe_chunks(batch)
        if self.window.add(batch.queries, batch.positions, padded=batch.padded):
            self._resized = True
        if self.plan.observers and not self._observed:
            observe_only(self.storage, batch, self.plan.observers)

    def _compress_and_pack(self, *, decoding: bool, immediately: bool = False, step: ForwardStep | None = None) -> None:
        """Compress and pack what is due; `step` is the forward that has just been, if there was one."""
        if self.padded and self.compressed:
            self.close_gaps()
        if self._protects_spans:
            end = self.scheduler.prompt_end
            self._note_prompt(over=end is None or self.seq_len >= end)
        prompt = self.scheduler.prompt
        if prompt is not None and prompt.is_prompt:
            return  # until the passes over it are done
        if self.ordinal == 0:
            self.plan.budgets.say_if_raised(self.num_tokens, self.min_entries(self.num_tokens))
        if self.plan.compresses_jointly:
            self.scheduler.attended(self, decoding=decoding)
            return
        may_be_due = step is None or self._may_be_due(step, decoding=decoding)
        rows = self._due(self.num_tokens, decoding=decoding) if may_be_due else []
        if rows:
            self.close_gaps()
            for alike in self.plan.budgets.protected_alike(self.num_tokens, rows):
                self.scheduler.due(self, alike, decoding=decoding, immediately=immediately)
        if self.plan.packs:
            self.scheduler.pack(self, decoding=decoding, immediately=immediately)

    def _observe_chunks(self, batch: QueryBatch) -> None:
        """Let scorers see the chunks that a forward completes; hold its queries of the one that it does not."""
        if batch.queries.shape[2] == 1 and not self.plan.keeps_chunk_queries:
            if self.chunk_window.nbytes:  # else nothing is waiting, and the host need not be told which rows go on
                self.before_compression()
                real = (batch.positions[:, 0] >= 0).tolist() if batch.padded else [True] * len(self.num_tokens)
                self.after_compression([row for row, has_token in enumerate(real) if has_token])
            return
        observe_complete_chunks(self.storage, batch, self._chunk_queries, self.num_tokens, self.plan.chunk_observers)
        if self.chunk_window.add(batch.queries, batch.positions, padded=batch.padded):
            self._resized = True

    def _chunk_queries(self) -> QueryBatch | None:
        queries, positions = self.chunk_window.last(range(len(self.num_tokens)))
        if queries is None or positions is None:
            return None
        return QueryBatch(queries, positions, padded=True, scaling=self.scaling)

    def before_compression(self) -> None:
        """Let scorers see the chunk of tokens that is not complete."""
        queries = self._chunk_queries() if self.plan.chunk_observers else None
        if queries is not None:
            observe_newest_chunk(self.storage, queries, self.plan.chunk_observers)

    def after_compression(self, rows: Sequence[int]) -> None:
        """Drop the queries of that chunk, where a policy compresses prompts alone: they are large."""
        if self.chunk_window.nbytes and not self.plan.keeps_chunk_queries:
            self.chunk_window.drop(rows)
            self._sample()

    @exactly
    def compress_prompt(self) -> None:
        """Compress and pack what is due of a prompt over which all passes are done."""
        self._compress_and_pack(decoding=False)

    def due_after_prompt(self) -> list[int]:
        """Rows that hold too much once a prompt has come."""
        return self._due(self.num_tokens, decoding=False)

    def close_gaps(self) -> None:
        """Drop the pads, which leave gaps between entries."""
        if self.padded:
            self.storage.drop_pads(self.limit_behind_eviction)
            self.padded, self.compressed, self.rollback_limit = False, True, self.seq_len
            self._sample()

    def before_packing(self) -> None:
        """Leave out pads, which would leave their mark on a group."""
        if self.padded and self.plan.wants_order(self.ordinal):
            self.close_gaps()

    def note_packing(self) -> None:
        """Something has been packed."""
        self.compressed, self.rollback_limit = self.compressed or not self.storage.is_plain, self.seq_len
        self._sample()

    def _may_be_due(self, step: ForwardStep, *, decoding: bool) -> bool:
        """Whether a row may hold too much behind a forward; if not, no row has to be looked at."""
        if self._protects_spans:
            return True
        heads = self.plan.geometry.kv_heads
        held = self.storage.fullest if self.compressed else step.most_tokens * heads
        return held > step.least_allowed(decoding=decoding)[self.ordinal] * heads

    def _due(self, num_tokens: Sequence[int], *, decoding: bool, before: int = 0) -> list[int]:
        """Rows that hold too much at `num_tokens` tokens, the newest `before` entries of every head left out."""
        heads = self.plan.geometry.kv_heads
        held = [entries - before * heads for entries in self.entries]
        if not self.compressed:
            held = [tokens * heads for tokens in num_tokens]
        plan, ordinal = self.plan, self.ordinal
        if self._protects_spans:
            pairs = zip(num_tokens, self.min_entries(num_tokens), strict=True)
            allowed = [
                entries_allowed(plan, ordinal, tokens, decoding=decoding, least=least) for tokens, least in pairs
            ]
        else:
            allowed = [entries_allowed(plan, ordinal, tokens, decoding=decoding) for tokens in num_tokens]
        return [row for row, entries in enumerate(held) if entries > allowed[row] * heads]

    @property
    def entries(self) -> list[int]:
        """Entries of each row in all KV heads, pads excluded."""
        # Until the first eviction a row holds all its real tokens, whatever the pads beside them.
        if self.compressed:
            return [sum(row) for row in self.storage.lengths]
        return [tokens * self.plan.geometry.kv_heads for tokens in self.num_tokens]

    def view(self, rows: Sequence[int]) -> View:
        """The rows as plugins see them; as many entries must be protected in each of them."""
        return build_view(
            self.plan,
            self.storage,
            self.window.last(rows),
            rows,
            layer=self.ordinal,
            protected=self.plan.budgets.protected(self.num_tokens[rows[0]]),
            scaling=self.scaling,
            row_state=self.row_state,
            in_order=self.in_order,
            spans=self.spans,
            output_projection=self.output_projection,
        )

    def budget(self, rows: Sequence[int]) -> list[int]:
        """Entries per KV head that each of the rows may keep."""
        least, entries = self.min_entries(self.num_tokens), self.plan.budgets.entries
        return [entries(self.ordinal, self.num_tokens[row], least[row]) for row in rows]

    def min_entries(self, num_tokens: Sequence[int]) -> list[int]:
        """Entries per KV head that each row must keep because the policy protects spans of it; 0 where it does not."""
        if not self._protects_spans:
            return [0] * len(num_tokens)
        self._note_prompt(over=False)
        protected = self.plan.budgets.protected
        return [self.spans.protected(row, tokens, *protected(tokens)) for row, tokens in enumerate(num_tokens)]

    def _note_prompt(self, *, over: bool) -> None:
        """Say what of each row is the first prompt; candidates of assisted decoding may have come behind it already."""
        end = self.scheduler.prompt_end
        behind = 0 if end is None else max(0, self.seq_len - end)
        self.spans.note_prompt([tokens + self._num_new - behind for tokens in self.num_tokens], over=over)

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
        if not moved:
            write_back(self.storage, rows, result, self.limit_behind_eviction, fills=fills, filling=filling)
        for name, values in result.row_state.items():
            self.row_state[name][list(rows)] = values
        self.in_order, self.compressed, self.rollback_limit = self.in_order and not fills, True, self.seq_len
        self._sample()

    @property
    def limit(self) -> int:
        """Slots per KV head beyond which storage does not grow, unless entries need it."""
        return self._limit_at(max(self.seq_len, 1))

    @property
    def limit_behind_eviction(self) -> int:
        """The same where entries have just been evicted: of a joint budget a layer may have got the share of others."""
        return self._limit_at(max(self.seq_len, 1), evicted=True)

    def _limit_at(self, seq_len: int, *, evicted: bool = False) -> int:
        least = max(self.min_entries(self.num_tokens), default=0) if self._protects_spans else 0
        capacity = self.plan.capacity_behind_eviction if evicted else self.plan.capacity
        return capacity(self.ordinal, seq_len, least)

    def _sample(self, index: Sequence[Tensor] = (), counted: set[int] | None = None) -> None:
        beside = [*index, *self.row_state.values(), *self.recording.tensors, *self.stats.tensors]
        if self.ordinal == 0:
            beside += self.spans.tensors  # which are there for all layers, as are these
            if self.scheduler.prompt is not None:
                beside += self.scheduler.prompt.tensors
            if self.scheduler.undone is not None:
                beside.append(self.scheduler.undone)
        self._resized = False
        state = (bytes_of(beside, counted) if beside else 0) + self.recording.saved_bytes
        self.stats.rows = len(self.state.num_tokens)
        self.stats.sample(self.seq_len, self.storage.average, self.storage.nbytes, self.state.window_bytes, state)

    def count(self, counted: set[int]) -> None:
        """Bring `stats` up to date, to the last byte; what layers share is in `counted`."""
        if self.is_initialized:
            self._sample(self.storage.index_tensors, counted)

    def note_compression(self, seconds: float = 0.0) -> None:
        """Count a compression, and the host time that it took."""
        self.state.compressions += 1
        self.stats.compressions = self.state.compressions
        self.stats.seconds += seconds

    # -- decode steps of fixed shapes --------------------------------------------------------------------------

    @exactly
    def enter_fixed_storage(self, storage: FixedStorage, window: ObservationWindow) -> None:
        """Go on in a storage and a window for steps of fixed shapes, in order and without pads."""
        self.close_gaps()
        if not self.in_order:
            self.storage.sort_by_position()
        storage.fill(self.storage)
        window.fill(self.window, self.state.rows)
        self.state = attrs.evolve(self.state, storage=storage, window=window, in_order=True)
        self._sample()

    @exactly
    def leave_fixed_storage(self) -> None:
        """Go on in a storage and a window of its own, which hold what those of fixed shapes do."""
        rows = range(self.state.rows)
        storage, window = self.storage.selected(rows), self.window.selected(rows)
        self.state = attrs.evolve(self.state, storage=storage, window=window)
        self._sample()

    def note_static_step(self, storage: FixedStorage, num_tokens: list[int], left: Sequence[int] | None) -> None:
        """Note a step that is done: `left` is what a compression has left in each KV head of a row, if there was one.

        `num_tokens` may be shared with other layers. The device is not asked.
        """
        state = self.state
        state.num_tokens, state.seq_len = num_tokens, state.seq_len + 1
        storage.note_appended()
        state.window.note_step()
        average = storage.slots.average
        self.stats.read_by_step(average)
        if left is not None:
            storage.note_left(left)
            state.compressed, state.rollback_limit = True, state.seq_len
            average = storage.average
            self.note_compression()
        self.stats.advance(state.seq_len, average)

    def require_agreement(self) -> None:
        """Raise CacheError when steps of fixed shapes have left something else than the host expects."""
        if isinstance(self.storage, FixedStorage):
            self.storage.require_agreement()

    def prepare(self) -> None:
        """Note that this layer is about to change by itself, which it does in a storage of its own.

        Raises as `require_agreement` does.
        """
        self.changes += 1
        if self.state.storage.is_fixed:
            with self.integrity.hand_over():
                self.require_agreement()
                self.leave_fixed_storage()

    @contextlib.contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        """The body is a change of this layer alone. Raises CacheError when an earlier one of the cache has failed."""
        with self.integrity.change(name):
            self.prepare()
            yield

    def __getstate__(self) -> dict[str, Any]:
        """A copy has its entries to itself, in a storage of its own. Raises as `require_agreement` does."""
        with self.integrity.unmoved:
            if not isinstance(self.storage, FixedStorage):
                return self.__dict__
            if self.integrity.is_whole:
                self.require_agreement()
            return {**self.__dict__, "state": self.state.copied()}

    # -- undoing, and moving rows ---------------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        """From now on keep what it takes to undo the tokens since the last `crop`: candidates of assisted decoding.

        What comes next is a prompt. It is compressed, and what comes behind it evicts what it would evict token by
        token, when another token follows, or in `crop`. Raises UnsupportedCallError, before any change, where all
        layers compete for the budget.
        """
        self.require_recordable()
        with self._changing("activate_past_recording"):
            self.record()

    def require_recordable(self) -> None:
        """Raise UnsupportedCallError unless candidates can be taken layer by layer."""
        if self.plan.passes:
            name = self.plan.passes[0].scorer.name
            raise UnsupportedCallError(
                f"score: {name} reads prompts again when a forward is over, and assisted decoding compresses a prompt "
                "within one: decode without an assistant"
            )
        if self.plan.compresses_jointly:
            name = self.plan.spec.allocate.divider.name
            raise UnsupportedCallError(
                f"allocate.joint: {name} compresses all layers at once, and candidates of assisted decoding are taken "
                "layer by layer: decode without an assistant"
            )

        if self.plan.spec.budget.generated is not None:
            raise UnsupportedCallError(
                f"budget: {self.plan.spec.budget} counts tokens that candidates of assisted decoding may take back: "
                "decode without an assistant"
            )

    def record(self) -> None:
        """Do what `activate_past_recording` does, as part of a change of the whole cache."""
        self.prepare()
        self.record_past = True
        if self.recording.is_empty:
            self.expects_prompt = True

    @exactly
    def crop(self, tokens_to_remove: int) -> None:
        """Undo the newest `-tokens_to_remove` tokens; a positive number is the length to return to.

        Then evict what is due. Raises CacheError when entries have been evicted since the tokens
        to undo came: those do not come back.
        """
        count = self.undone_by(tokens_to_remove)
        with self._changing("crop"):
            self.remove(count)
            self.scheduler.end()

    def remove(self, count: int) -> None:
        """Do what `crop` does to this layer, as part of a change of the whole cache: undo the newest `count` tokens."""
        before = self.recording.crop(self, count)
        if before:
            self.drop(before)
            for window in (self.window, self.chunk_window):
                window.forget(torch.tensor(self.num_tokens, device=self.device))
        if self.is_initialized:
            self._sample()

    def undone_by(self, tokens_to_remove: int) -> int:
        """How many tokens `crop` would undo. Raises CacheError when it could not.

        A layer that no forward has reached so far has nothing to undo.
        """
        if not self.is_initialized:
            return 0
        given = int(tokens_to_remove)  # transformers 5.16 and 5.17 give a tensor
        count = -given if given <= 0 else max(0, self.seq_len - given)
        saved = self.recording.saved
        possible = self.seq_len - (self.rollback_limit if saved is None else saved.rollback_limit)
        if count > possible:
            raise CacheError(
                f"layer {self.stats.layer}: cannot undo {count} tokens, entries were evicted or packed "
                f"{possible} tokens ago; call activate_past_recording() before tokens that may be undone"
            )
        return count

    # -- what recording needs ----------------------------------------------------------------------------------

    @property
    def one_by_one(self) -> bool:
        """Whether every single token may change what the next one attends to."""
        return self.plan.wants_order(self.ordinal)

    @property
    def has_observers(self) -> bool:
        """Whether anything follows what is attended to."""
        return bool(self.plan.observers)

    def would_be_due(self, before: int, *, decoding: bool) -> bool:
        """Whether a row would have been compressed before the newest `before` tokens came."""
        return bool(self._due([tokens - before for tokens in self.num_tokens], decoding=decoding, before=before))

    def append_recorded(self, recorded: RecordedTokens) -> None:
        """Append tokens, whose positions are known."""
        positions = recorded.batch.positions
        self.seq_len += recorded.count
        self.storage.append(recorded.keys, recorded.values, self._spread(positions), self.limit)
        counts = (positions >= 0).sum(1).tolist() if recorded.batch.padded else [recorded.count] * len(self.num_tokens)
        self.num_tokens = [num_tokens + count for num_tokens, count in zip(self.num_tokens, counts, strict=True)]
        self.padded = self.padded or min(counts) < recorded.count

    def observe_and_compress(self, batch: QueryBatch, *, decoding: bool, observed: bool) -> None:
        """Observe queries, then compress and pack what is due; `observed` says that observers have seen them."""
        self._observed = observed
        self._observe(batch)
        self._compress_and_pack(decoding=decoding, immediately=True)
        self._observed = False

    def save(self) -> LayerState:
        """A copy of all that tokens change."""
        return self.state.copied()

    def restore(self, saved: LayerState) -> None:
        """Go on with such a copy, of this layer or of one like it, which must not be used again."""
        if not saved.in_order and not self.plan.fills_holes:  # where it was made, compressions ran without kernels
            saved.storage.sort_by_position()
            saved.in_order = True
        self.state, self.is_initialized, self._resized = saved, saved.rows > 0, True
        self.dtype, self.device = self.plan.dtype, saved.storage.device
        self.stats.compressions = saved.compressions

    def drop(self, count: int) -> None:
        """Drop the newest tokens, behind which nothing has been altered."""
        if not count:
            return
        rows = enumerate(self.num_tokens)
        self.num_tokens = [n - int((self.storage.positions(row, 0)[-count:] >= 0).sum()) for row, n in rows]
        self.storage.truncate(count)
        self.seq_len -= count
        if self.padded:  # pads stand in all heads of their row
            first = [self.storage.positions(row, 0) for row in range(len(self.num_tokens))]
            self.padded = any(bool((positions < 0).any()) for positions in first)

    def select_rows(self, rows: Sequence[int]) -> None:
        if self.is_initialized:
            require_rows(len(self.num_tokens), rows)
            with self._changing("move of rows"):
                self.move_rows(rows)
                self.spans.select_rows(rows)

    @exactly
    def move_rows(self, rows: Sequence[int]) -> None:
        """Do what `select_rows` does, as part of a change of the whole cache."""
        if self.is_initialized:
            self.state, self._resized = self.state.selected(rows), True
            self.recording.select_rows(rows)


def _chosen_on_average(slots: Tensor) -> Tensor:
    """How many of the slots [B, K, n] a reader has chosen, float64 []; it stays on the device."""
    return (slots >= 0).double().sum(-1).mean()


def require_batch(layer: int, rows: int, *states: Tensor) -> None:
    """Raise CacheError unless the states [B, ...] that a layer is given are of the rows that it holds."""
    for given in states:
        if given.shape[0] != rows:
            raise CacheError(
                f"layer {layer}: the cache holds {rows} rows, the forward has {given.shape[0]}; "
                "use a cache of its own for each batch, or batch_select_indices() to take rows out of one"
            )
