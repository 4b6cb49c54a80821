"""The cache layer: what `generate` sees as one layer's cache, bounded by a plan."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvpolicy.attention.attend import attend, follow_only
from kvpolicy.attention.read_request import chosen_by, question_of
from kvpolicy.cache.compaction.write_back import drop_pads, lay_down, view_of
from kvpolicy.cache.integrity import Integrity
from kvpolicy.cache.layer_state import LayerState
from kvpolicy.cache.query_batch import Asked
from kvpolicy.cache.recording import Recording, Taken
from kvpolicy.cache.request_spans import RequestSpans
from kvpolicy.cache.scheduler import CompressionScheduler
from kvpolicy.cache.stats import LayerStats
from kvpolicy.cache.storage.storage_bytes import bytes_of
from kvpolicy.cache.trigger import entries_allowed
from kvpolicy.errors import CacheError, UnsupportedCallError, UnsupportedModelError
from kvpolicy.integrations.transformers.calls.padding_mask import Arrival
from kvpolicy.integrations.transformers.lending import LendingLayer
from kvpolicy.integrations.transformers.logical_layer import require_rows
from kvpolicy.integrations.transformers.torch_modes import exactly, taking_states
from kvpolicy.plan.compress.step import Compressed
from kvpolicy.plan.plan import POSITIONS, Plan
from kvpolicy.stages import View

_NOWHERE = torch.empty(0, dtype=torch.int32)  # positions, where none is waited for


class PolicyLayer(LendingLayer):
    """Storage of one layer. The lengths it reports are logical: tokens seen, whatever is still held.

    One forward is `update` (append), then, from the attention function that alone sees the queries, `arrive` (which of
    the new tokens are real) and `settle` (observe, compress). The keys that `update` returns carry the layer, as
    attribute `kvpolicy_layer`.
    """

    def __init__(
        self,
        plan: Plan,
        ordinal: int,
        scheduler: CompressionScheduler | None = None,
        integrity: Integrity | None = None,
        spans: RequestSpans | None = None,
    ) -> None:
        """`scheduler`, `integrity` and `spans` are those of the cache; without them the layer is a cache by itself."""
        super().__init__()
        self.plan = plan
        self.ordinal = ordinal
        self.scheduler = scheduler or CompressionScheduler(plan, waits=False)
        self.stats = LayerStats(plan.geometry.managed[ordinal])
        self.integrity = integrity or Integrity([self.stats.layer])
        self.spans = spans or RequestSpans(plan.spec.protect)
        self._protects_spans = plan.spec.protect.by_place
        self.empty()

    def reset(self) -> None:
        with self.integrity.renewal():
            self.scheduler.clear()
            self.spans.clear()
            self.empty()

    @exactly
    def empty(self) -> None:
        """Do what `reset` does, as part of a change of the whole cache."""
        self.reclaim()
        self.is_initialized = False
        self.state = LayerState.empty(self.plan, self.ordinal, 0, self.plan.device)
        self._arriving = 0  # tokens appended whose attention has not run yet
        self._places = _NOWHERE  # and their positions, [B, q]
        self.recording = Recording()  # what a rollback may still undo
        self._new: tuple[Tensor, Tensor] | None = None  # keys and values of this forward, while they are recorded
        self._taken: Taken | None = None  # the tokens of this forward, while they are recorded
        self._followed = False  # whether followers have seen the queries of this forward

    # -- one forward -------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make an empty store. Raises UnsupportedModelError when the entries do not have the planned shape."""
        self._require_shape(key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        empty = LayerState.empty(self.plan, self.ordinal, key_states.shape[0], self.device)
        empty.record_past, empty.prompting = self.record_past, self.prompting
        self.state, self.is_initialized = empty, True

    def _require_shape(self, key_states: Tensor, value_states: Tensor) -> None:
        geometry, dtype = self.plan.geometry, self.plan.dtype
        expected = (geometry.kv_heads, geometry.head_dim)
        for states in (key_states, value_states):
            found = (states.shape[1], states.shape[3])
            if found != expected or states.dtype != dtype:
                raise UnsupportedModelError(
                    f"layer {self.stats.layer}: (KV heads, head dim) must be {expected} in {dtype}: "
                    f"{found} in {states.dtype}"
                )

    @taking_states
    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append post-RoPE [B, K, q, D]; returns all entries while nothing was altered, else the new ones.

        Raises CacheError, before any change, when the cache is not whole or holds another number of rows.
        """
        self.integrity.require_ready(self.stats.layer)
        if self.is_initialized:
            require_batch(self.stats.layer, len(self.real), key_states, value_states)
        else:
            self._require_shape(key_states, value_states)
            self.spans.begin(key_states.shape[0])
        self.integrity.begin_update(self.stats.layer)
        self.prepare()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._arriving = key_states.shape[2]
        limit = self._limit_at(self.seen + self._arriving)  # a plugin is asked, and may fail, before anything changes
        self.seen += self._arriving
        self._places = self.scheduler.positions(self.real, self._arriving, self.device)
        self.held.append(key_states, value_states, self._spread(self._places), limit)
        self._new = (key_states, value_states) if self.record_past else None
        keys, values = (key_states, value_states) if self.altered else self.held.stored()
        keys = keys.view(keys.shape)  # a fresh alias, which can carry an attribute
        keys.kvpolicy_layer = self  # type: ignore[attr-defined]
        return keys, values

    @exactly
    def arrive(self, arrival: Arrival | None) -> Tensor:
        """Positions of the appended tokens, [B, q], now that it is known which are pads (position -1).

        Raises CacheError when the tokens have been attended to already, or when the mask is of other rows.
        """
        self.integrity.require_updated(self.stats.layer)
        if arrival is not None and tuple(arrival.valid.shape) != (len(self.real), self._arriving):
            raise CacheError(
                f"layer {self.stats.layer}: the mask is of {tuple(arrival.valid.shape)} (rows, tokens), "
                f"the forward of {(len(self.real), self._arriving)}"
            )
        counts = [self._arriving] * len(self.real)
        if arrival is not None and arrival.padded:
            places = torch.tensor(self.real, device=self.device)[:, None] + arrival.valid.cumsum(1) - 1
            self._places = places.masked_fill(~arrival.valid, -1).to(torch.int32)
            self.held.slots.overwrite_tail(POSITIONS, self._spread(self._places))
            self.padded, counts = True, arrival.counts
        self.real = [real + count for real, count in zip(self.real, counts, strict=True)]
        self._arriving = 0
        return self._places

    @exactly
    def attend(self, asked: Asked, dropout: float = 0.0) -> Tensor | None:
        """Attention over what is held and read, [B, H, q, D]; None when that is all there ever was: a stock call."""
        self.scaling = asked.scaling
        if self._new is not None:
            self._taken = Taken(*self._new, asked)
            return self.recording.attend(self, self._taken, self.scheduler.prompt_end, dropout)
        slots = self._chosen(asked)
        if not self.altered and slots is None:
            self._note_reading(asked, None)
            return None
        self._followed = True
        return self._attended(asked, slots, dropout, followed=True)

    def attended(self, asked: Asked, dropout: float, *, followed: bool) -> Tensor:
        """Attention over what is held and read, [B, H, q, D]; `followed` says whether followers see it."""
        return self._attended(asked, self._chosen(asked), dropout, followed=followed)

    def _attended(self, asked: Asked, slots: Tensor | None, dropout: float, *, followed: bool) -> Tensor:
        self._note_reading(asked, slots)
        followers, kernels = self.plan.followers if followed else (), self.plan.kernels
        return attend(self.held, asked, slots, followers, pads=self.padded, dropout=dropout, kernels=kernels)

    def _chosen(self, asked: Asked) -> Tensor | None:
        """The slots [B, K, n] that the reader picks for a decode step; None = all."""
        if asked.queries.shape[2] > 1 or not self.plan.selective:
            return None
        return chosen_by(self.plan.spec.read, question_of(self.plan, self.held, asked, self.ordinal))

    def _note_reading(self, asked: Asked, slots: Tensor | None) -> None:
        if asked.queries.shape[2] == 1:
            chosen = None if slots is None else float((slots >= 0).sum()) / max(1, slots.shape[0] * slots.shape[1])
            self.stats.read_by_step(self.held.slots.average if chosen is None else chosen)

    def _spread(self, positions: Tensor) -> Tensor:
        return positions[:, None].expand(-1, self.plan.geometry.kv_heads, -1)

    @exactly
    def settle(self, asked: Asked) -> None:
        """After attention: observe the queries and compress the rows that are due; later, if it may be undone."""
        self.scaling = asked.scaling
        self._places = _NOWHERE
        if self._taken is not None:
            self.recording.settle(self, self._taken, self.scheduler.prompt_end)
            self._taken = self._new = None
            self._sample()
        else:
            self._observe(asked)
            self._sample()
            self._compress_and_pack(decoding=asked.queries.shape[2] == 1)
        self._followed = False
        if self.integrity.is_last(self.stats.layer):
            self.scheduler.end()
        self.integrity.end_update(self.stats.layer)

    def would_alter(self) -> bool:
        """Whether attention may be over less than all tokens: entries are packed, chosen, or about to be evicted."""
        if self.plan.wants_order(self.ordinal):
            return True
        ahead = [real + self._arriving for real in self.real]
        decoding = self._arriving == 1 or (self.record_past and not self.prompting)
        return bool(self._due(ahead, decoding=decoding))

    # -- compression -------------------------------------------------------------------------------------------

    def _observe(self, asked: Asked) -> None:
        self.window.add(asked.queries, asked.positions, padded=asked.padded)
        if self.plan.followers and not self._followed:
            follow_only(self.held, asked, self.plan.followers)

    def _compress_and_pack(self, *, decoding: bool, immediately: bool = False) -> None:
        if self.altered:
            self.close_gaps()
        if self._protects_spans:
            end = self.scheduler.prompt_end
            self._note_prompt(over=end is None or self.seen >= end)
        if self.ordinal == 0:
            self.plan.budgets.say_if_raised(self.real, self.least(self.real))
        if self.plan.compresses_jointly:
            self.scheduler.attended(self, decoding=decoding)
            return
        rows = self._due(self.real, decoding=decoding)
        if rows:
            self.close_gaps()
            for alike in self.plan.budgets.protected_alike(self.real, rows):
                self.scheduler.due(self, alike, decoding=decoding, immediately=immediately)
        self.seal()

    def close_gaps(self) -> None:
        """Drop the pads, which leave gaps between entries."""
        if self.padded:
            drop_pads(self.plan, self.held, self.limit)
            self.padded, self.altered, self.rollback_limit = False, True, self.seen
            self._sample()

    def seal(self) -> None:
        """Pack what the formats say, pads left out: they would leave their mark on a group."""
        if self.padded and self.plan.wants_order(self.ordinal):
            self.close_gaps()
        if self.held.seal(self.limit):
            self.altered, self.rollback_limit = self.altered or not self.held.is_plain, self.seen
            self._sample()

    def _due(self, real: Sequence[int], *, decoding: bool, before: int = 0) -> list[int]:
        """Rows that hold too much at `real` tokens, the newest `before` entries of every head left out."""
        heads = self.plan.geometry.kv_heads
        held = [entries - before * heads for entries in self.entries]
        if not self.altered:
            held = [tokens * heads for tokens in real]
        plan, ordinal = self.plan, self.ordinal
        if self._protects_spans:
            pairs = zip(real, self.least(real), strict=True)
            allowed = [entries_allowed(plan, ordinal, seen, decoding=decoding, least=least) for seen, least in pairs]
        else:
            allowed = [entries_allowed(plan, ordinal, tokens, decoding=decoding) for tokens in real]
        return [row for row, entries in enumerate(held) if entries > allowed[row] * heads]

    @property
    def entries(self) -> list[int]:
        """Entries of each row in all KV heads, pads excluded."""
        # Until the first eviction a row holds all its real tokens, whatever the pads beside them.
        heads = self.plan.geometry.kv_heads
        return [sum(row) for row in self.held.slots.lengths] if self.altered else [real * heads for real in self.real]

    def shown(self, rows: Sequence[int]) -> View:
        """The rows as plugins see them; as many entries must be protected in each of them."""
        return view_of(
            self.plan,
            self.held,
            self.window,
            rows,
            layer=self.ordinal,
            protected=self.plan.budgets.protected(self.real[rows[0]]),
            scaling=self.scaling,
            row_state=self.row_state,
            in_order=self.in_order,
            spans=self.spans,
        )

    def budget(self, rows: Sequence[int]) -> list[int]:
        """Entries per KV head that each of the rows may keep."""
        least = self.least(self.real)
        return [max(self.plan.budgets.per_layer(self.real[row])[self.ordinal], least[row]) for row in rows]

    def least(self, real: Sequence[int]) -> list[int]:
        """Entries per KV head that each row must keep at `real` tokens, because the policy protects spans; else 0."""
        if not self._protects_spans:
            return [0] * len(real)
        self._note_prompt(over=False)
        protected = self.plan.budgets.protected
        return [self.spans.protected(row, tokens, *protected(tokens)) for row, tokens in enumerate(real)]

    def _note_prompt(self, *, over: bool) -> None:
        """Say what of each row is the first prompt; candidates of assisted decoding may have come behind it already."""
        end = self.scheduler.prompt_end
        behind = 0 if end is None else max(0, self.seen - end)
        self.spans.note_prompt([tokens + self._arriving - behind for tokens in self.real], over=over)

    def take(self, rows: Sequence[int], result: Compressed, *, fills: bool = False, moved: bool = False) -> None:
        """Reduce the rows to what a compression left of them, which may have `moved` into place already."""
        if not moved:
            lay_down(self.plan, self.held, rows, result, self.limit, fills=fills)
        for name, values in result.row_state.items():
            self.row_state[name][list(rows)] = values
        self.in_order, self.altered, self.rollback_limit = self.in_order and not fills, True, self.seen
        self._sample()

    @property
    def limit(self) -> int:
        """Slots per KV head beyond which storage does not grow."""
        return self._limit_at(max(self.seen, 1))

    def _limit_at(self, seen: int) -> int:
        capacity = self.plan.capacity(self.ordinal, seen)
        if not self._protects_spans:
            return capacity
        return max(capacity, max(self.least(self.real), default=0) + self.plan.budgets.slack)

    def _sample(self, index: Sequence[Tensor] = (), counted: set[int] | None = None) -> None:
        beside = [*index, *self.row_state.values(), *self.recording.tensors]
        if self.ordinal == 0:
            beside += self.spans.tensors  # which are there for all layers
        average = self.stats.held if self._reclaim else self._held.slots.average
        state = (bytes_of(beside, counted) if beside else 0) + self.recording.saved_bytes
        self.stats.sample(self.seen, average, self._held.nbytes, self.window.nbytes, state)

    def count(self, counted: set[int]) -> None:
        """Bring `stats` up to date, to the last byte; what layers share is in `counted`. What is lent stays lent."""
        if self.is_initialized:
            self._sample(self._held.index_tensors, counted)

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
        if self.plan.compresses_jointly:
            name = self.plan.spec.allocate.divider.name
            raise UnsupportedCallError(
                f"allocate.joint: {name} compresses all layers at once, and candidates of assisted decoding are taken "
                "layer by layer: decode without an assistant"
            )

    def record(self) -> None:
        """Do what `activate_past_recording` does, as part of a change of the whole cache."""
        self.prepare()
        self.record_past = True
        if self.recording.is_empty:
            self.prompting = True

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
            self.window.forget(torch.tensor(self.real, device=self.device))
        if self.is_initialized:
            self._sample()

    def undone_by(self, tokens_to_remove: int) -> int:
        """How many tokens `crop` would undo. Raises CacheError when it could not.

        A layer that no forward has reached so far has nothing to undo.
        """
        if not self.is_initialized:
            return 0
        asked = int(tokens_to_remove)  # transformers 5.16 and 5.17 give a tensor
        count = -asked if asked <= 0 else max(0, self.seen - asked)
        saved = self.recording.saved
        possible = self.seen - (self.rollback_limit if saved is None else saved.rollback_limit)
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
    def watched(self) -> bool:
        """Whether anything follows what is attended to."""
        return bool(self.plan.followers)

    def alters(self, before: int, *, decoding: bool) -> bool:
        """Whether a row would have been compressed before the newest `before` tokens came."""
        return bool(self._due([real - before for real in self.real], decoding=decoding, before=before))

    def put(self, taken: Taken) -> None:
        """Append tokens, whose positions are known."""
        positions = taken.asked.positions
        self.seen += taken.count
        self.held.append(taken.keys, taken.values, self._spread(positions), self.limit)
        counts = (positions >= 0).sum(1).tolist() if taken.asked.padded else [taken.count] * len(self.real)
        self.real = [real + count for real, count in zip(self.real, counts, strict=True)]
        self.padded = self.padded or min(counts) < taken.count

    def digest(self, asked: Asked, *, decoding: bool, followed: bool) -> None:
        """Observe queries, then compress and pack what is due; `followed` says that followers have seen them."""
        self._followed = followed
        self._observe(asked)
        self._compress_and_pack(decoding=decoding, immediately=True)
        self._followed = False

    def save(self) -> LayerState:
        """A copy of all that tokens change."""
        self.reclaim()
        return self.state.copied()

    def restore(self, saved: LayerState) -> None:
        """Go on with such a copy, of this layer or of one like it, which must not be used again."""
        self.state, self.is_initialized = saved, saved.rows > 0
        self.dtype, self.device = self.plan.dtype, saved.held.slots.device
        self.stats.compressions = saved.compressions

    def drop(self, count: int) -> None:
        """Drop the newest tokens, behind which nothing has been altered."""
        if not count:
            return
        for row, real in enumerate(self.real):
            newest = self.held.slots.segment(POSITIONS, row, 0)[-count:]
            self.real[row] = real - int((newest >= 0).sum())
        self.held.truncate(count)
        self.seen -= count
        if self.padded:  # pads stand in all heads of their row
            first = [self.held.slots.segment(POSITIONS, row, 0) for row in range(len(self.real))]
            self.padded = any(bool((positions < 0).any()) for positions in first)

    def select_rows(self, rows: Sequence[int]) -> None:
        if self.is_initialized:
            require_rows(len(self.real), rows)
            with self._changing("move of rows"):
                self.move_rows(rows)
                self.spans.select_rows(rows)

    @exactly
    def move_rows(self, rows: Sequence[int]) -> None:
        """Do what `select_rows` does, as part of a change of the whole cache."""
        if self.is_initialized:
            self.reclaim()
            self.state = self.state.selected(rows)
            self.recording.select_rows(rows)


def require_batch(layer: int, rows: int, *states: Tensor) -> None:
    """Raise CacheError unless the states [B, ...] that a layer is given are of the rows that it holds."""
    for given in states:
        if given.shape[0] != rows:
            raise CacheError(
                f"layer {layer}: the cache holds {rows} rows, the forward has {given.shape[0]}; "
                "use a cache of its own for each batch, or batch_select_indices() to take rows out of one"
            )
