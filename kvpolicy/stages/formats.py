"""How the keys or the values of a layer are held."""

import abc
import sys
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.stages.geometry import Geometry
from kvpolicy.stages.rotary import Rotary
from kvpolicy_kernels.attention.kv_input import Unpacking

ALL = sys.maxsize


@attrs.frozen
class Column:
    """One tensor of a store: what a slot, or a group of slots, holds under one name."""

    shape: tuple[int, ...]  # per slot or group; () for a scalar
    dtype: torch.dtype
    fill: float = 0.0

    @property
    def bytes_per_slot(self) -> int:
        """Bytes that one slot, or one group, takes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@attrs.frozen(eq=False)
class Site:
    """Where a codec or a reader is put to work: one managed layer of one model."""

    geometry: Geometry
    dtype: torch.dtype  # of the model's own keys and values
    layer: int = 0  # ordinal among the managed layers
    rotary: Rotary | None = None  # None = the model's rotation is not known
    calibration: Mapping[str, Tensor] = attrs.field(factory=dict)  # what the plugin's `calibrate` gave for this layer


@attrs.frozen(eq=False)
class Sample:
    """One layer of a model on calibration text: S sequences of T tokens at positions 0 to T - 1."""

    geometry: Geometry
    scaling: float  # the attention module's own factor on q·k
    rotary: Rotary | None
    queries: Tensor  # [S, H, T, D] post-RoPE
    keys: Tensor  # [S, K, T, D] post-RoPE
    values: Tensor  # [S, K, T, D]


class Format(abc.ABC):
    """One half of the entries, their keys or their values, of one layer: which of them are packed, and how.

    The oldest entries of a head are packed, the newest stay as the model gave them: the residual. With `length` entries
    in a head, `packed_length(length)` are packed: all but the newest `residual_length`, in whole steps of `step`.
    Groups are packed independently of each other, so nothing that is packed has to be packed again when entries come.
    """

    columns: Mapping[str, Column]  # what holds a group; the first dimension of a joint column is usually K
    group_size: int = 1  # consecutive entries of a head that are packed together; divides `step` and `residual_length`
    step: int = 1  # entries that are packed at one time
    residual_length: int = 0  # newest entries that are never packed; ALL = none is ever packed
    joint: bool = False  # whether a group holds the entries of all KV heads at one slot, which must then be as many

    @abc.abstractmethod
    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Vectors [B, K, n, D] at positions [B, K, n], n a multiple of `group_size`, to the columns.

        Each column is [B, K, n / group_size, *shape], or [B, 1, n / group_size, *shape] of a joint format. Empty slots
        (position -1) hold any finite vector.
        """

    @abc.abstractmethod
    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """Columns back to vectors [B, K, n, D] in the model's dtype; `positions` [B, K, n] of the same slots."""

    def unpacking(self) -> "Unpacking | str":
        """How a GPU decodes entries while it attends to them; or why it cannot, in a few words."""
        return "has no tile function"

    def packed_length(self, length: int) -> int:
        """How many of the oldest of `length` entries are packed."""
        return max(0, length - self.residual_length) // self.step * self.step

    def residual_capacity(self, capacity: int) -> int:
        """The most entries that are not packed at one time, while tokens come one by one up to `capacity`."""
        return min(capacity, self.residual_length + self.step)

    def nbytes(self, capacity: int, geometry: Geometry, dtype: torch.dtype) -> float:
        """Bytes for one head of up to `capacity` entries: groups, and the residual in `dtype`."""
        packed = (
            self.packed_length(capacity)
            // self.group_size
            * sum(column.bytes_per_slot for column in self.columns.values())
        )
        shared = geometry.kv_heads if self.joint else 1
        return packed / shared + self.residual_capacity(capacity) * geometry.head_dim * dtype.itemsize


@attrs.frozen(eq=False)
class AsIs(Format):
    """Nothing is packed."""

    columns: Mapping[str, Column] = attrs.field(factory=dict)
    residual_length: int = ALL

    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 nothing is packed
        return {}

    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        raise CacheError(f"no columns hold the {positions.numel()} entries asked for: {sorted(columns)}")


@attrs.frozen(eq=False)
class Formats:
    """How a layer holds its keys and its values."""

    keys: Format
    values: Format
