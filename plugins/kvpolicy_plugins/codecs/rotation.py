"""Codec `rotation`: randomly rotated vectors, quantised with one codebook."""

import functools
from collections.abc import Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Codec, Column, Format, Formats, Integer, Site, parameter
from kvpolicy_plugins.codecs.shared.affine import SCALES, cast_clamped, compute_dtype, scale_dtype
from kvpolicy_plugins.codecs.shared.codebook import codebook, edges_between
from kvpolicy_plugins.codecs.shared.packing import pack, packed_size, unpack
from kvpolicy_plugins.shared.limits import SEED

_BLOCK = 32  # up to this size a matrix product is faster than further halving


@attrs.frozen(eq=False)
class Rotated(Format):
    """The norm of each vector, and for each coordinate of the rotated unit vector the nearest code."""

    signs: tuple[int, ...]  # [D], each 1 or -1
    dtype: torch.dtype  # of the model's own vectors
    stored: torch.dtype  # of norms
    bits: int
    residual_length: int = 0
    columns: Mapping[str, Column] = attrs.field(init=False)

    @columns.default
    def _columns(self) -> dict[str, Column]:
        codes = Column((packed_size(len(self.signs), self.bits),), torch.uint8)
        return {"codes": codes, "norm": Column((), self.stored)}

    def encode(self, vectors: Tensor, positions: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 at any position
        exact = vectors.to(compute_dtype(vectors.dtype))
        norm = exact.norm(dim=-1).clamp(max=torch.finfo(exact.dtype).max / 4)  # leaves room to decode
        directions = exact / norm.masked_fill(norm == 0, 1)[..., None]
        rotated = hadamard(directions * _tensor(self.signs, exact.dtype, exact.device))
        codes = torch.zeros(rotated.shape, dtype=torch.uint8, device=rotated.device)
        for edge in edges_between(codebook(self.bits)):  # many times faster than a binary search
            codes += rotated > edge
        return {"codes": pack(codes, self.bits), "norm": cast_clamped(norm, self.stored)}

    def decode(self, columns: Mapping[str, Tensor], positions: Tensor) -> Tensor:  # noqa: ARG002
        dim, exact, device = len(self.signs), compute_dtype(self.dtype), columns["codes"].device
        pairs = unpack(columns["codes"], 2 * self.bits, -(-dim // 2))
        complex_levels = _pairs(self.bits, exact, device).index_select(0, pairs.flatten().int())
        rotated = torch.view_as_real(complex_levels).view(*pairs.shape, 2).flatten(-2)[..., :dim]
        norm = columns["norm"].to(exact)[..., None] / dim
        return cast_clamped(hadamard(rotated).mul_(_tensor(self.signs, exact, device)).mul_(norm), self.dtype)


@attrs.frozen
class Rotation(Codec):
    """A random rotation, then the best scalar codebook for normal numbers (TurboQuant, section 3.1).

    With random signs s and the Hadamard matrix H, the coordinates of √D · H (s · x) / ‖x‖ are nearly standard normal,
    for every x. There is no calibration, and only the norm is stored per vector. The second stage of the paper,
    one bit for unbiased inner products, and its mixed widths are not implemented.
    """

    name: ClassVar[str] = "rotation"
    reference: ClassVar[str] = "arXiv:2504.19874"

    bits: int = parameter(Integer(minimum=1, maximum=4), 4, help="bits per number")
    seed: int = parameter(SEED, 0, help="seed of the random signs")
    residual: int = parameter(Integer(minimum=0), 0, help="how many of the newest entries are not packed")
    scales: str = parameter(SCALES, "half", help="norms in float16, or in the model's own precision")

    def formats(self, site: Site) -> Formats:
        dim = site.geometry.head_dim
        if dim.bit_count() != 1:
            raise ParameterError(f"rotation: must have a head dimension that is a power of two: {dim}")
        random = torch.Generator().manual_seed(self.seed)
        signs = tuple((2 * torch.randint(2, (dim,), generator=random) - 1).tolist())
        rotated = Rotated(signs, site.dtype, scale_dtype(self.scales, site.dtype), self.bits, self.residual)
        return Formats(rotated, rotated)


def hadamard(vectors: Tensor) -> Tensor:
    """Vectors [..., D] times Sylvester's matrix of 1 and -1; D a power of two. Twice gives D times the vectors."""
    dim = vectors.shape[-1]
    width = min(dim, _BLOCK)
    matrix = _sylvester(width, vectors.dtype, vectors.device)
    product: Tensor = (vectors.unflatten(-1, (dim // width, width)) @ matrix).flatten(-2)
    while width < dim:
        first, second = product.unflatten(-1, (dim // width // 2, 2, width)).unbind(-2)
        product = torch.stack([first + second, first - second], -2).flatten(-3)
        width *= 2
    return product


# Constants are cached per device: a transfer per token would take longer than the computation. They are made outside
# inference mode, so that they can be used outside of it later.
@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def _tensor(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def _pairs(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Complex [4^bits]: the levels of two neighbouring codes, so that one look-up serves both."""
    numbers = _tensor(codebook(bits), dtype, device)
    second, first = torch.meshgrid(numbers, numbers, indexing="ij")
    return torch.complex(first, second).flatten()


@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def _sylvester(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[D, D] of 1 and -1, symmetric; its square is D times the identity."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while matrix.shape[0] < dim:
        matrix = torch.kron(matrix.new_tensor([[1, 1], [1, -1]]), matrix)
    return matrix
