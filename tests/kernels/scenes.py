"""Entries laid out as the runtime lays them out: several layers, ragged or dense, with dirt behind every segment."""

import attrs
import pytest
import torch
from torch import Tensor

from kvpolicy_kernels import Column, Segments

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOUD = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy reports overflows that a GPU does not
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@attrs.frozen(eq=False)
class Scene:
    """Segments with random entries. `lists` give what a naive reference reads: one [length, ...] per segment."""

    segments: Segments
    columns: dict[str, Column]
    seed: int

    def lists(self, name: str) -> list[Tensor]:
        """The entries of each segment, in order of P."""
        column, found = self.columns[name], []
        starts, lengths = self.segments.starts.tolist(), self.segments.lengths.tolist()
        for place, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            storage = column.storages[place // self.segments.per_layer]
            found.append(storage[start : start + length])
        return found


def scene(
    lengths: Tensor,
    dim: int,
    dtype: torch.dtype,
    *,
    capacity: int | None = None,
    extra: dict[str, tuple[tuple[int, ...], torch.dtype]] | None = None,
    seed: int = 0,
) -> Scene:
    """Layers with `lengths` [L, B, K]: dense with `capacity` slots per segment, or packed one behind another (ragged).

    Columns: `keys` and `values` [slots, dim], `positions` [slots] int32 (ascending, with gaps), and `extra` ones by
    name, as (shape of a slot, dtype). Slots that hold nothing are full of NaN (floats) or -1 (integers).
    """
    random = torch.Generator().manual_seed(seed)
    layers, rows, heads = lengths.shape
    shapes = {"keys": ((dim,), dtype), "values": ((dim,), dtype), "positions": ((), torch.int32), **(extra or {})}
    starts = _starts(lengths, capacity)
    slots = (lengths.flatten(1).sum(1) + 7).tolist() if capacity is None else [rows * heads * capacity + 7] * layers
    storages = {name: [_dirt((count, *shape), kind) for count in slots] for name, (shape, kind) in shapes.items()}
    for place, (start, length) in enumerate(zip(starts.tolist(), lengths.flatten().tolist(), strict=True)):
        for name, (shape, kind) in shapes.items():
            filled = _fill(name, (length, *shape), kind, random)
            storages[name][place // (rows * heads)][start : start + length] = filled
    columns = {name: _column(tensors) for name, tensors in storages.items()}
    longest = int(capacity or max(1, int(lengths.max())))
    flat = lengths.flatten().to(torch.int32).to(DEVICE)
    return Scene(Segments(starts.to(DEVICE), flat, layers, rows, heads, longest), columns, seed)


LABELS = ("none", "all", "some", "heads", "rows")


def label(kind: str, segments: Segments, seed: int = 0) -> Tensor:
    """Protected slots [P, T] bool: none, all, any, all of some heads, or some that differ from row to row.

    Behind a head's last entry it is anything.
    """
    random = torch.Generator().manual_seed(seed)
    shape = (segments.count, segments.longest)
    some = torch.rand(shape, generator=random) < 0.4
    row = torch.arange(segments.count) // segments.heads
    pinned = {
        "none": torch.zeros(shape, dtype=torch.bool),
        "all": torch.ones(shape, dtype=torch.bool),
        "some": some,
        "heads": (torch.rand(shape[0], 1, generator=random) < 0.5).expand(shape),
        "rows": torch.arange(shape[1]).expand(shape) < (7 * row[:, None]) % 31,
    }[kind]
    behind = torch.arange(shape[1]) >= segments.lengths.cpu()[:, None]
    return pinned.where(~behind, some).contiguous().to(DEVICE)


def _starts(lengths: Tensor, capacity: int | None) -> Tensor:
    per_layer = lengths.flatten(1)
    if capacity is not None:
        return (torch.arange(per_layer.shape[1]) * capacity).repeat(lengths.shape[0])
    return (per_layer.cumsum(1) - per_layer).flatten()


def _dirt(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan if dtype.is_floating_point else -1, dtype=dtype, device=DEVICE)


def _fill(name: str, shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> Tensor:
    if name == "positions":
        return torch.randint(1, 4, shape, generator=random).cumsum(0).sub(1).to(dtype)
    if not dtype.is_floating_point:
        return torch.randint(0, 100, shape, generator=random).to(dtype)
    return torch.randn(shape, generator=random).to(dtype)


def _column(tensors: list[Tensor]) -> Column:
    addresses = torch.tensor([one.data_ptr() for one in tensors], dtype=torch.int64, device=DEVICE)
    return Column(addresses, tensors[0].dtype, max(1, tensors[0][0].numel()), tuple(tensors))
