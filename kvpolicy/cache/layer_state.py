"""All that tokens change in one managed layer, as one object: to copy, to move rows in, to go back to, and to save.

The fields are the only list of it: rows are selected, and tensors and numbers described and restored, field by field.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import attrs
import torch
from torch import Tensor

from kvpolicy.cache.observation_window import ObservationWindow
from kvpolicy.cache.state_contents import Contents, Described, below, counts_of
from kvpolicy.cache.storage.layer_storage import LayerStorage
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.cache.storage.storage_bytes import bytes_of
from kvpolicy.errors import CacheError
from kvpolicy.plan.plan import Plan
from kvpolicy.stages import Geometry

NewStorage = Callable[[Plan, int, int, torch.device], LayerStorage]  # plan, managed layer, rows, device


@attrs.define(eq=False)
class LayerState:
    """Entries, state of rows and slots, observed queries and counts of B rows of one layer."""

    storage: LayerStorage
    window: ObservationWindow
    chunk_window: ObservationWindow  # queries of a chunk of tokens that is not complete, if scorers observe chunks
    row_state: dict[str, Tensor]  # of the merger, float32 [B]
    num_tokens: list[int]  # tokens of each row, pads excluded
    seq_len: int = 0  # tokens, pads included: the columns of the model's own attention mask
    compressed: bool = False  # whether entries have been evicted or packed: until then the stock attention is exact
    padded: bool = False  # whether pads are held: only until then
    in_order: bool = True  # whether entries stand in ascending order of position
    rollback_limit: int = 0  # `seq_len` when entries last changed place: no rollback beyond it
    scaling: float = 1.0  # of the logits, as the attention last said
    record_past: bool = False  # whether the tokens that come may be undone: candidates of assisted decoding
    expects_prompt: bool = True  # whether a prompt comes next, while that is recorded
    compressions: int = 0  # how many there have been

    @classmethod
    def empty(
        cls, plan: Plan, ordinal: int, rows: int, device: torch.device, new_storage: NewStorage = SegmentedStorage
    ) -> Self:
        """That of `rows` rows of the managed layer number `ordinal`, before any token."""
        row_state = {
            state.name: torch.full((rows,), state.fill, dtype=torch.float32, device=device)
            for state in plan.spec.merge.row_state()
        }
        storage = new_storage(plan, ordinal, rows, device)
        windows = ObservationWindow(plan.needs.queries), ObservationWindow(plan.chunk_queries)
        return cls(storage, *windows, row_state, [0] * rows)

    @property
    def rows(self) -> int:
        """B; 0 before the first forward."""
        return len(self.num_tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        beside = bytes_of([*self.storage.index_tensors, *self.row_state.values()])
        return self.storage.nbytes + self.window_bytes + beside

    @property
    def window_bytes(self) -> int:
        """Bytes of the queries that are held."""
        return self.window.nbytes + self.chunk_window.nbytes

    def selected(self, rows: Sequence[int]) -> Self:
        """The state of the rows named, in that order, that shares no storage; one may be named more than once."""
        return attrs.evolve(self, **{name: _selected(getattr(self, name), rows) for name in _fields()})

    def copied(self) -> Self:
        """A state of the same rows that shares no storage."""
        return self.selected(range(self.rows))

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return self.copied()

    def describe(self) -> Described:
        """Named tensors, which share the storages of this state, and plain numbers."""
        for name in _fields():
            value = getattr(self, name)
            if isinstance(value, (bool, int, float)):
                yield name, value
            elif isinstance(value, list):
                yield name, counts_of(value)
            else:
                yield from below(name, value.items() if isinstance(value, dict) else value.describe())

    def restore(self, contents: Contents, geometry: Geometry) -> None:
        """Take the state of as many rows that is written there; this one is empty.

        Raises the error of the contents for what does not fit the plan, and CacheError for what contradicts itself.
        """
        for name in _fields():
            setattr(self, name, self._restored(name, getattr(self, name), contents, geometry))
        self.check_integrity()

    def _restored(self, name: str, empty: Any, contents: Contents, geometry: Geometry) -> Any:
        """What is written under a name, of the kind of an empty value, which may be filled and given back."""
        if isinstance(empty, bool):
            return contents.flag(name)
        if isinstance(empty, int):
            return contents.integer(name)
        if isinstance(empty, float):
            return contents.number(name)
        if isinstance(empty, list):
            return contents.counts(name, (self.rows,))
        part = contents.below(name)
        if isinstance(empty, dict):
            return {key: part.tensor(key, tensor.dtype, tensor.shape) for key, tensor in empty.items()}
        if isinstance(empty, ObservationWindow):
            empty.restore(part, self.rows, geometry)
        else:
            empty.restore(part)
        return empty

    def check_integrity(self) -> None:
        """Raise CacheError when entries, counts or observed queries contradict each other."""
        self.storage.check_integrity()
        for window in (self.window, self.chunk_window):
            window.check_integrity(self.num_tokens)
        if any(num_tokens > self.seq_len for num_tokens in self.num_tokens) or self.rollback_limit > self.seq_len:
            raise CacheError(f"{self.num_tokens} tokens came, or {self.rollback_limit} stay, of {self.seq_len} seen")
        plain = self.storage.is_plain and all(n == self.seq_len for row in self.storage.lengths for n in row)
        if self.rows and not self.compressed and not plain:
            raise CacheError(
                f"{self.storage.lengths} entries are held of {self.seq_len} tokens that are all said to be"
            )
        for row, num_tokens in enumerate(self.num_tokens):
            for head in range(self.storage.heads):
                self._check_positions(row, head, self.storage.positions(row, head).long(), num_tokens)

    def _check_positions(self, row: int, head: int, positions: Tensor, num_tokens: int) -> None:
        """Raise CacheError unless the positions [n] of a segment are those of different tokens that came."""
        came = positions[positions >= 0]
        pads = positions.shape[0] - came.shape[0]
        steps = (came if self.in_order else came.sort().values).diff()
        if bool((positions < -1).any()) or bool((came >= num_tokens).any()) or bool((steps <= 0).any()):
            raise CacheError(
                f"row {row} head {head}: positions must be of different tokens, in order, below {num_tokens}"
            )
        if (pads and not self.padded) or (not self.compressed and came.shape[0] != num_tokens):
            raise CacheError(f"row {row} head {head}: {came.shape[0]} entries of {num_tokens} tokens, {pads} pads")


def _fields() -> list[str]:
    return [field.name for field in attrs.fields(LayerState)]


def _selected(value: Any, rows: Sequence[int]) -> Any:
    """A field for the rows named: numbers are of the whole layer, lists and tensors have an item for each row."""
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, list):
        return [value[row] for row in rows]
    if isinstance(value, dict):
        return {name: tensor[list(rows)] for name, tensor in value.items()}
    return value.selected(rows)
