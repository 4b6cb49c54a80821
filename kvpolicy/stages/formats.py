"""Storage formats of the keys or the values of a layer."""

import abc
import sys
from collections.abc import Mapping, Sequence

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
    """One named tensor of a store: its shape and dtype per slot, or per group of slots."""

    shape: tuple[int, ...]  # per slot or group; () for a scalar
    dtype: torch.dtype
    fill: float = 0.0

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one slot or group."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@attrs.frozen(eq=False)
class Site:
    """The layer that a plugin is used in: one managed layer of one model."""

    geometry: Geometry
    dtype: torch.dtype  # of the model's keys and values
    layer: int = 0  # ordinal among the managed layers
    rotary: Rotary | None = None  # None = the rotary embedding is not known
    calibration: Mapping[str, Tensor] = attrs.field(factory=dict)  # result of the plugin's `calibrate` for this layer


@attrs.frozen(eq=False)
class Sample:
    """One layer of a model on calibration text, or on what `Plugin.probes` made of it: S sequences of T tokens."""

    geometry: Geometry
    scaling: float  # the attention module's own factor on q·k
    rotary: Rotary | None
    queries: Tensor  # [S, H, T, D] post-RoPE, at positions 0 to T - 1
    keys: Tensor  # [S, K, T, D] post-RoPE
    values: Tensor  # [S, K, T, D]


class Format(abc.ABC):
    """Storage format of the keys or the values of one layer: which entries are packed, and how.

    The oldest entries of a head are packed; the newest, the residual, stay in the model's dtype. With `length` entries
    in a head, `packed_length(length)` are packed: all but the newest `residual_length`, in whole steps of `step`.
    Groups are packed independently, so packed entries are never packed again when entries are added.
    """

    columns: Mapping[str, Column]  # columns of a group; the first dimension of a joint column is usually K
    group_size: int = 1  # consecutive entries of a head packed together; divides `step` and `residual_length`
    step: int = 1  # entries packed at a time
    residual_length: int = 0  # newest entries, which are not packed; ALL = no entries are packed
    joint: bool = False  # whether a group has one entry of every KV head; all heads then have equal lengths

    @abc.abstractmethod
    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Pack vectors [B, K, n, D] at positions [B, K, n], n a multiple of `group_size`, into columns.

        Each column is [B, K, n / group_size, *shape], or [B, 1, n / group_size, *shape] of a joint format. Empty slots
        (position -1) have arbitrary finite vectors.
        """

    @abc.abstractmethod
    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """Unpack columns to vectors [B, K, n, D] in the model's dtype; `positions` [B, K, n] are those of the slots."""

    def of_head(self, head: int) -> "Format":  # noqa: ARG002 heads are alike
        """The format of one KV head, for a segment that is read by itself; the same, unless heads differ."""
        return self

    def of_entries(self, heads: Sequence[int], counts: Sequence[int]) -> "Format | None":  # noqa: ARG002 heads are alike
        """What unpacks entries [1, 1, n] of several segments behind each other: `counts[i]` of KV head `heads[i]`.

        It gives what `of_head` gives of each. None = there is no such format, and segments are unpacked one by one.
        """
        return self if self.of_head(0) is self else None

    # Attention is computed in a basis of the format's choice: queries and unpacked entries are taken to it, packed ones
    # are never taken back from it, only the output is. By default it is the basis of the model. Where heads have bases
    # of their own, vectors are [B, K, n, D].

    def to_basis(self, vectors: Tensor) -> Tensor:
        """Vectors [..., D] of entries, in at least float32, in the format's basis."""
        return vectors

    def queries_to_basis(self, queries: Tensor) -> Tensor:
        """Queries [..., D] in the basis in which their products with keys are those of the model.

        That of the keys itself, where that basis is orthonormal; its dual otherwise.
        """
        return self.to_basis(queries)

    def from_basis(self, vectors: Tensor) -> Tensor:
        """The inverse of `to_basis`."""
        return vectors

    def decode_in_basis(self, columns: Mapping[str, Tensor], positions: Tensor, dtype: torch.dtype) -> Tensor:
        """What `to_basis` would give of decoded vectors, [B, K, n, D] in `dtype`, at least float32."""
        return self.to_basis(self.decode(columns, positions).to(dtype))

    def unpacking(self) -> "Unpacking | str":
        """The tile function with which attention kernels unpack entries; or a short reason why there is none."""
        return "has no tile function"

    def packed_length(self, length: int) -> int:
        """How many of the oldest of `length` entries are packed."""
        return max(0, length - self.residual_length) // self.step * self.step

    def residual_capacity(self, capacity: int) -> int:
        """Largest residual while tokens are added one by one up to `capacity`."""
        return min(capacity, self.residual_length + self.step)

    def nbytes(self, capacity: int, geometry: Geometry, dtype: torch.dtype, *, uneven: bool = False) -> float:
        """Bytes of one head with up to `capacity` entries: packed groups, and the residual in `dtype`.

        With `uneven` the most that heads take on average which hold as many on average: a head with more entries than
        others has more groups, and one with fewer has a residual all the same.
        """
        shared = geometry.kv_heads if self.joint else 1
        group_bytes = sum(column.bytes_per_slot for column in self.columns.values()) / shared
        if uneven:  # concave and nowhere below, so that the mean over heads is at most that of the mean
            longest = self.residual_length + self.step
            packed = max(capacity - self.residual_length, min(capacity, longest) * self.step / longest)
        else:
            packed = self.packed_length(capacity) // self.group_size * self.group_size
        residual = self.residual_capacity(capacity)
        return packed / self.group_size * group_bytes + residual * geometry.head_dim * dtype.itemsize


@attrs.frozen(eq=False)
class AsIs(Format):
    """Stores all entries in the model's dtype; packs nothing."""

    columns: Mapping[str, Column] = attrs.field(factory=dict)
    residual_length: int = ALL

    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 nothing is packed
        return {}

    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        raise CacheError(f"no entries are packed: cannot decode {positions.numel()} entries from {sorted(columns)}")


@attrs.frozen(eq=False)
class Formats:
    """Storage formats of the keys and the values of a layer."""

    keys: Format
    values: Format
