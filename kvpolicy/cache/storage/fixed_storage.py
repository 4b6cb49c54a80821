"""Entries in tensors that are never replaced: a captured decode step reads and writes them where they are."""

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy.cache.device_faults import DeviceFaults
from kvpolicy.cache.storage.layer_storage import LayerStorage
from kvpolicy.cache.storage.layout import Layout
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.errors import CacheError
from kvpolicy.plan.plan import POSITIONS, Plan


class FixedStorage(SegmentedStorage):
    """C slots for each (row, KV head). All heads of a row hold equally many entries, in order of position, unpacked.

    Its lengths exist twice. The host's are those of any storage, and are right whenever no step runs: whoever runs a
    step notes what it has done (`note_appended`, `note_left`) from counts of its own, and never asks the device. The
    device's, `lengths_in_step`, are the only ones that a step reads and changes (`append_in_step`, `close_up`, or a
    kernel over `in_step`). `fill` writes both; `require_agreement` waits for the device and compares them.

    Steps alone change what is held. Whoever wants another change takes a copy (`selected`), which is an ordinary
    `SegmentedStorage`.
    """

    is_fixed: ClassVar[bool] = True

    def __init__(
        self,
        plan: Plan,
        ordinal: int,
        rows: int,
        device: torch.device,
        capacity: int,
        faults: DeviceFaults | None = None,
    ) -> None:
        """`faults` are those that the steps count."""
        super().__init__(plan, ordinal, rows, device)
        self._layer, self._faults = plan.geometry.managed[ordinal], faults
        layout = Layout.even(rows, self.heads, capacity)
        for store in self.plain_stores:
            store.adopt(store.allocate(layout), layout, layout.with_each(0))
        self._in_slots = self.plain_stores
        self.tensors = {name: tensor for store in self.plain_stores for name, tensor in store.tensors.items()}
        self.lengths_in_step = torch.zeros(rows * self.heads, dtype=torch.int32, device=device)
        self.starts = self.slots.starts  # int64 [B·K]
        self.in_step = self.over([*self.tensors.values(), self.lengths_in_step])

    def over(self, tensors: Sequence[Tensor]) -> SegmentedStorage:
        """What a step sees: all slots, position -1 in empty ones, with the lengths on the device.

        `tensors` are the flat ones of the columns, in the order of `tensors`, and last the lengths, int32 [B·K].
        """
        *flat, lengths = tensors
        columns, keys, values = dict(zip(self.tensors, flat, strict=True)), copy.copy(self.keys), copy.copy(self.values)
        keys.residual, values.residual, slots = (
            store.with_lengths_on_device({name: columns[name] for name in store.columns}, self.starts, lengths)
            for store in self.plain_stores
        )
        parts = {"keys": keys, "values": values, "slots": slots, "page_summaries": self.page_summaries}
        return self._made_of(parts)

    # -- effects on both copies of the lengths -----------------------------------------------------------------

    def fill(self, source: LayerStorage) -> None:
        """Hold the entries of another storage, which are unpacked and in order, and nothing else."""
        at, lengths, layout = source.everything, source.lengths, self.slots.layout
        positions = source.column(POSITIONS, at)
        for part, reader in ((self.keys, source.keys), (self.values, source.values)):
            entries = {part.name: reader.read(at, 0, positions.shape[2], positions)}
            part.residual.replace(at.rows, entries, lengths, layout)
        self.slots.replace(at.rows, {name: source.column(name, at) for name in self.columns}, lengths, layout)
        self.lengths_in_step.copy_(torch.tensor(lengths).flatten())

    def require_agreement(self) -> None:
        """Tell what the steps have counted: faults, and lengths, which a plugin may have made others than were due.

        Raises CacheError for lengths, and as `DeviceFaults.flush` does.
        """
        if self._faults is not None:
            self._faults.flush()
        counted = self.lengths_in_step.view(self.rows, self.heads).tolist()
        if counted != [list(row) for row in self.lengths]:
            raise CacheError(f"layer {self._layer}: rows hold {counted} entries instead of {self.lengths}")

    def check_integrity(self) -> None:
        super().check_integrity()
        self.require_agreement()

    # -- effects on the device alone ---------------------------------------------------------------------------

    def append_in_step(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Add one token a row, [B, K, 1, D], at position [B] behind all segments; the other columns get their fill."""
        ends = self.starts + self.lengths_in_step
        for name, column in self.columns.items():
            if name != POSITIONS:
                self.tensors[name].index_fill_(0, ends, column.fill)
        self.tensors["keys"].index_copy_(0, ends, keys.flatten(0, 2))
        self.tensors["values"].index_copy_(0, ends, values.flatten(0, 2))
        self.tensors[POSITIONS].index_copy_(0, ends, positions[:, None].expand(-1, self.heads).flatten())
        self.lengths_in_step.add_(1)

    # -- effects on the host alone -----------------------------------------------------------------------------

    def note_appended(self) -> None:
        """Note that a step has appended one token a row."""
        for store in self._in_slots:
            store._added += 1  # noqa: SLF001 - the one thing that is done for every token and layer

    def note_left(self, lengths: Sequence[int]) -> None:
        """Note how many entries a compression in a step has left in each KV head of a row, [B]."""
        table = tuple((length,) * self.heads for length in lengths)
        for store in self.plain_stores:
            store.adopt(store.tensors, store.layout, table)


def close_up(storage: SegmentedStorage, kept: Tensor) -> None:
    """Move the slots that stay, [B, K, C], to the front of their segments, in their order: on the device alone.

    `storage` is what a step sees. Slots behind the last one repeat the first: what was evicted could be NaN, and a
    masked slot is still multiplied.
    """
    behind = kept < 0
    starts = storage.slots.starts.view(*kept.shape[:2], 1)
    sources = (starts + torch.where(behind, kept[..., :1].clamp(min=0), kept)).flatten()
    for store in storage.plain_stores:
        for tensor in store.tensors.values():
            tensor.copy_(tensor.index_select(0, sources))
    storage.slots.tensors[POSITIONS].masked_fill_(behind.flatten(), -1)
    storage.slots.lengths_on_device.copy_((~behind).sum(-1).flatten())
