"""Vectors after a random rotation, each coordinate as the nearest level of one codebook."""

import functools
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Column, Format, PackedColumn, Unpacking
from kvpolicy_plugins.codecs.shared.affine import cast_clamped, compute_dtype
from kvpolicy_plugins.codecs.shared.calibrated.mean_keys import MeanKeys
from kvpolicy_plugins.codecs.shared.codebook import codebook, nearest_code
from kvpolicy_plugins.codecs.shared.hadamard import hadamard
from kvpolicy_plugins.codecs.shared.packing import INDEX_BITS, pack, packed_size, unpack_indices

_BYTES = 16  # of the largest number that is moved at once
_KERNEL_LEVELS = 16  # the attention kernel selects among all of them, for every number


@attrs.frozen(eq=False)
class Rotated(Format):
    """The norm of each vector, and for each coordinate of the rotated unit vector the nearest code.

    With signs s and the Hadamard matrix H, the coordinates are those of √D · H (s · x) / ‖x‖. With `norm_correction`
    the number that is stored is √D ‖x‖ / ‖levels‖ instead, with which the decoded vector has the norm of x.

    With `means` x is the difference from the mean at its position.
    """

    signs: tuple[int, ...]  # [D], each 1 or -1
    dtype: torch.dtype  # of the model's own vectors
    stored: torch.dtype  # of norms
    bits: int
    residual_length: int = 0
    step: int = 1
    levels: tuple[float, ...] = attrs.field()  # [2^bits], ascending, for standard normal numbers
    norm_correction: bool = False
    upper_on_edge: bool = False  # which code a coordinate halfway between two levels has
    means: MeanKeys | None = None
    columns: Mapping[str, Column] = attrs.field(init=False)
    _heads: dict[int, "Rotated"] = attrs.field(init=False, factory=dict, repr=False)

    @levels.default
    def _levels(self) -> tuple[float, ...]:
        return codebook(self.bits)

    @columns.default
    def _columns(self) -> dict[str, Column]:
        codes = Column((packed_size(len(self.signs), self.bits),), torch.uint8)
        return {"codes": codes, "norm": Column((), self.stored)}

    def of_head(self, head: int) -> "Rotated":
        if self.means is None:
            return self
        if head not in self._heads:
            self._heads[head] = attrs.evolve(self, means=self.means.of_head(head))
        return self._heads[head]

    def of_entries(self, heads: Sequence[int], counts: Sequence[int]) -> "Rotated":
        return self if self.means is None else attrs.evolve(self, means=self.means.of_entries(heads, counts))

    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:
        exact = vectors.to(compute_dtype(vectors.dtype))
        if self.means is not None:
            exact = exact - self.from_basis(self.means.at(positions, exact.dtype))
        norm = exact.norm(dim=-1).clamp(max=torch.finfo(exact.dtype).max / 4)  # leaves room to decode
        directions = exact / norm.masked_fill(norm == 0, 1)[..., None]
        rotated = hadamard(directions * _tensor(self.signs, exact.dtype, exact.device))
        codes = nearest_code(rotated, self.levels, upper_on_edge=self.upper_on_edge)
        if self.norm_correction:
            levels = _tensor(self.levels, exact.dtype, exact.device)[codes.int()]
            norm = norm * (len(self.signs) ** 0.5 / levels.norm(dim=-1))
        return {"codes": pack(codes, self.bits), "norm": cast_clamped(norm, self.stored)}

    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        exact = compute_dtype(self.dtype)
        return cast_clamped(self.from_basis(self.decode_in_basis(columns, positions, exact)), self.dtype)

    def to_basis(self, vectors: Tensor) -> Tensor:
        signs = _tensor(self.signs, vectors.dtype, vectors.device)
        return hadamard(vectors * (signs * len(self.signs) ** -0.5))

    def from_basis(self, vectors: Tensor) -> Tensor:
        signs = _tensor(self.signs, vectors.dtype, vectors.device)
        return hadamard(vectors * len(self.signs) ** -0.5).mul_(signs)  # sums of what is not divided might overflow

    def decode_in_basis(self, columns: Mapping[str, Tensor], positions: Tensor, dtype: torch.dtype) -> Tensor:
        dim, device = len(self.signs), columns["codes"].device
        per_index = self._codes_per_index(dtype)
        index = unpack_indices(columns["codes"], per_index * self.bits, -(-dim // per_index))
        combined = _combined(self.levels, per_index, dtype, device).index_select(0, index.flatten())
        levels = combined.view(dtype).view(*index.shape, per_index).flatten(-2)[..., :dim]
        scale = columns["norm"].to(dtype)[..., None] * dim**-0.5
        if self.means is None:
            return levels.mul_(scale)
        return torch.addcmul(self.means.at(positions, dtype), levels, scale)

    def _codes_per_index(self, dtype: torch.dtype) -> int:
        """How many neighbouring codes are looked up at once: tables have up to 2^12 entries."""
        fits = (count for count in (4, 2, 1) if count * dtype.itemsize <= _BYTES and count * self.bits in INDEX_BITS)
        return next(fits)

    def unpacking(self) -> Unpacking | str:
        if len(self.levels) > _KERNEL_LEVELS:
            return f"has more than {_KERNEL_LEVELS} levels"
        if self.means is not None:
            return "adds a mean that depends on the position"
        from kvpolicy_kernels.quantise.unpack import codebook as tile

        columns = PackedColumn(packed_size(len(self.signs), self.bits), torch.uint8), PackedColumn(1, self.stored)
        return Unpacking(tile, columns, options=(self.bits, *self.levels), in_basis=True)


# Constants are cached per device: a transfer per token would take longer than the computation. They are made outside
# inference mode, so that they can be used outside of it later.
@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def _tensor(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def _combined(levels: tuple[float, ...], per_index: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The levels of as many neighbouring codes for every index that these are, so that one look-up serves all of them.

    Several are moved as one number: a complex one of 8 or 16 bytes.
    """
    numbers, count = _tensor(levels, dtype, device), len(levels)
    index = torch.arange(count**per_index, device=device)[:, None]
    codes = index // count ** torch.arange(per_index, device=device) % count
    moved = {8: torch.complex64, _BYTES: torch.complex128}[per_index * dtype.itemsize] if per_index > 1 else dtype
    return numbers[codes].view(moved).flatten()
