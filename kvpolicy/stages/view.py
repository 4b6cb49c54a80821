"""What a plugin sees of one layer when the cache is compressed."""

from collections.abc import Iterator, Mapping
from functools import cached_property

import attrs
import torch
from torch import Tensor

from kvpolicy.stages.geometry import Geometry
from kvpolicy.stages.products import products
from kvpolicy.stages.rotary import Rotary
from kvpolicy.stages.slots import by_position

_LOGITS = 2**20  # that exist at one time: few enough to stay in a CPU's cache


@attrs.frozen(eq=False)
class View:
    """The held entries of one layer, plus what was observed about them. Plain tensors; build one by hand in tests.

    Along T, the entries of a head stand in ascending order of position; slots that hold nothing come last and
    have position -1. Left pads, finished rows and heads with smaller budgets are such empty slots, so a scorer
    that respects `valid` is right for padded batches and for ragged heads alike. Scorers that do not mind
    (`Scorer.in_any_order`) may be shown entries in another order, and `in_order` is then False.
    """

    keys: Tensor  # [B, K, T, D] post-RoPE, as cached
    values: Tensor  # [B, K, T, Dv]
    positions: Tensor  # [B, K, T] int, place among the row's real tokens; -1 = empty
    geometry: Geometry
    scaling: float  # the attention module's own factor on q·k
    layer: int = 0  # ordinal among the managed layers
    sinks: int = 0  # protected entries at the start of the sequence
    recent: int = 0  # protected entries at its end
    pinned: Tensor | None = None  # [B, K, T] bool, entries protected beside them: of the prompt, or of regions
    regions: Tensor | None = None  # [B, K, T] int8, numbers of the request's regions, 0 = in none
    region_names: tuple[str, ...] = ()  # the name of region 1, of region 2, ...
    region_spans: Tensor | None = None  # [B, S, 2] int, region number and first position of each span, 0 = no span
    queries: Tensor | None = None  # [B, H, W, D] post-RoPE, oldest first
    query_positions: Tensor | None = None  # [B, W] int; -1 = that row has had fewer than W queries
    attention: Tensor | None = None  # [B, K, G, T] float32, mass each entry has received since it was stored
    log_votes: Tensor | None = None  # [B, K, T] float32
    slot_state: Mapping[str, Tensor] = attrs.field(factory=dict)  # [B, K, T] float32 each, declared by the plugin
    row_state: Mapping[str, Tensor] = attrs.field(factory=dict)  # [B] float32 each, declared by the plugin
    rotary: Rotary | None = None  # None = the model's rotation is not known
    output_projection: Tensor | None = None  # [H, Dv, C], the weight that follows attention; None = nobody needs it
    calibration: Mapping[str, Tensor] = attrs.field(factory=dict)  # result of the plugin's `calibrate` for this layer
    in_order: bool = True  # whether entries stand in ascending order of position
    most_evicted: int | None = None  # a merger's: no head loses more entries; None = the host has not been told
    _computed: dict[str, Tensor] = attrs.field(init=False, factory=dict, repr=False)  # shared by `with_state`

    def with_state(
        self,
        slot_state: Mapping[str, Tensor],
        row_state: Mapping[str, Tensor] | None = None,
        calibration: Mapping[str, Tensor] | None = None,
    ) -> "View":
        """The same entries as another plugin sees them; what has been computed from them is shared."""
        other = attrs.evolve(self, slot_state=slot_state, row_state=row_state or {}, calibration=calibration or {})
        object.__setattr__(other, "_computed", self._computed)
        return other

    @cached_property
    def valid(self) -> Tensor:
        """[B, K, T] bool: slots that hold an entry."""
        return self.positions >= 0

    @cached_property
    def lengths(self) -> Tensor:
        """[B, K] int64: entries held per head."""
        return self.valid.sum(-1)

    @cached_property
    def age(self) -> Tensor:
        """[B, K, T] int64: 0 for the newest entry of a head, 1 for the one before it; negative in empty slots."""
        places = torch.arange(self.positions.shape[-1], device=self.positions.device)
        return self.in_slots(self.lengths[..., None] - 1 - places)

    @cached_property
    def protected(self) -> Tensor:
        """[B, K, T] bool: sink tokens, the recent window, and spans of the request that the policy protects."""
        protected = (self.positions < self.sinks) | (self.age < self.recent)
        return self.valid & (protected if self.pinned is None else protected | self.pinned)

    @cached_property
    def candidates(self) -> Tensor:
        """[B, K, T] bool: entries that may be evicted."""
        return self.valid & ~self.protected

    def in_region(self, name: str, *, but_newest: int = 0) -> Tensor:
        """[B, K, T] bool: entries in the region of the request with this name; none where the request has no such.

        Those of its `but_newest` newest spans are left out. A span that has been named and not begun is none of them.
        """
        if self.regions is None or name not in self.region_names:
            return torch.zeros_like(self.valid)
        number = self.region_names.index(name) + 1
        inside = self.valid & (self.regions == number)
        if not but_newest:
            return inside
        if self.region_spans is None:
            raise ValueError("this view has no spans of regions: declare the region in the plugin's `needs`")
        numbers, starts = self.region_spans.unbind(-1)
        begun = (numbers == number) & (starts <= self.positions.amax((1, 2))[:, None])
        newest = starts.masked_fill(~begun, -1).topk(min(but_newest, starts.shape[1]), dim=1).values
        return inside & (self.positions < newest[:, -1:, None])

    def in_sequence(self, values: Tensor) -> Tensor:
        """Values of the slots, [B, K, ..., T], in ascending order of position; those of empty slots come last."""
        return values if self.in_order else values.gather(-1, self._slots_for(values))

    def in_slots(self, values: Tensor) -> Tensor:
        """Values that stand in ascending order of position, [B, K, ..., T], back in their slots."""
        return values if self.in_order else torch.empty_like(values).scatter_(-1, self._slots_for(values), values)

    def _slots_for(self, values: Tensor) -> Tensor:
        """The slot of the first position, of the second, and so on, in the shape of the values."""
        if "by_position" not in self._computed:
            self._computed["by_position"] = by_position(self.positions)
        slots = self._computed["by_position"]
        return slots.reshape(*slots.shape[:2], *[1] * (values.ndim - 3), -1).expand(values.shape)

    @property
    def logits(self) -> Tensor:
        """[B, K, G, W, T] float32: scaled q·k of the window queries plus votes, -inf in empty slots.

        Later entries are not hidden from earlier queries; keys are not repeated.
        """
        if "logits" not in self._computed:
            self._computed["logits"] = self._logits()
        return self._computed["logits"]

    def _logits(self) -> Tensor:
        logits = products(*self._segments(self.window), self.scaling, torch.float32)
        logits = logits.unflatten(0, self.keys.shape[:2])  # [B, K, G·W, T]
        if self.log_votes is not None:
            logits += self.log_votes[:, :, None]
        logits.masked_fill_(~self.valid[:, :, None], -torch.inf)
        grouped: Tensor = logits.unflatten(2, (-1, self.window.shape[2]))
        return grouped

    def logits_by_head(self, newest: int) -> Iterator[tuple[slice, Tensor]]:
        """The logits of the newest w queries, a few heads at a time: less memory than `logits`, and in a CPU's cache.

        Gives slices of the B·K heads of all rows, and their logits [1, S, G, w, T] float32, which nobody else holds.
        They differ from `logits` in that empty slots are not hidden, and in that products are rounded to the dtype of
        the keys where that is faster (bfloat16).
        """
        newest = min(newest, self.window.shape[2])
        queries, keys = self._segments(self.window[:, :, -newest:])
        size = max(1, _LOGITS // max(1, queries.shape[1] * keys.shape[1]))
        for start in range(0, len(keys), size):
            heads = slice(start, start + size)
            logits = products(queries[heads], keys[heads], self.scaling)
            if self.log_votes is not None:
                logits += self.log_votes.flatten(0, 1)[heads, None]
            yield heads, logits.unflatten(1, (-1, newest))[None]

    def _segments(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The queries [B·K, G·w, D] and the keys [B·K, T, D] of each KV head; keys are not repeated."""
        grouped = queries.unflatten(1, (self.keys.shape[1], -1))
        return grouped.flatten(2, 3).flatten(0, 1), self.keys.flatten(0, 1)

    @property
    def unrotated_keys(self) -> Tensor:
        """[B, K, T, D] float32: the keys before rotation, for a scorer whose `needs` asked for `rotary`."""
        if self.rotary is None:
            raise ValueError("this view has no rotary embedding: declare it in the scorer's `needs`")
        return self.rotary.unrotate(self.keys.float(), self.positions)

    @property
    def projection(self) -> Tensor:
        """`output_projection`, for a plugin whose `needs` asked for it; the dtype is the model's."""
        if self.output_projection is None:
            raise ValueError("this view has no output projection: declare it in the plugin's `needs`")
        return self.output_projection

    @property
    def window(self) -> Tensor:
        """`queries`, for a scorer whose `needs` asked for them."""
        if self.queries is None:
            raise ValueError("this view has no queries: declare them in the scorer's `needs`")
        return self.queries

    @property
    def window_positions(self) -> Tensor:
        """[B, W] int: `query_positions`, by default those of the last W tokens of each row."""
        if self.query_positions is not None:
            return self.query_positions
        newest = self.positions.amax(dim=(1, 2))
        back = torch.arange(self.window.shape[2] - 1, -1, -1, device=newest.device)
        return newest[:, None] - back
