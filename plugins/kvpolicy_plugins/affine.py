"""Asymmetric affine quantisation: a group of numbers as codes on an even grid between its minimum and its maximum."""

from contextlib import suppress

import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Choice
from kvpolicy_kernels import UnsupportedInputError
from kvpolicy_plugins import affine_kernels
from kvpolicy_plugins.gpu import runs_kernels
from kvpolicy_plugins.packing import pack, unpack

BITS = Choice((2, 4, 8))
SCALES = Choice(("half", "full"))


def scale_dtype(scales: str, dtype: torch.dtype) -> torch.dtype:
    """Which dtype scales and minima have: float16 for `half`, the model's own `dtype` for `full`."""
    return torch.float16 if scales == "half" else dtype


def working(dtype: torch.dtype) -> torch.dtype:
    """What is computed in for vectors of `dtype`: half precision cannot tell 256 codes apart."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def narrowed(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in `dtype`; what float16 cannot hold becomes the largest that it can, not infinity."""
    if dtype == torch.float16 != numbers.dtype:
        limit = torch.finfo(dtype).max
        numbers = numbers.clamp(-limit, limit)
    return numbers.to(dtype)


def check_divides(name: str, size: int, head_dim: int) -> None:
    """Refuses groups that do not divide the vectors of a model.

    Raises:
        ParameterError: `size` does not divide `head_dim`.
    """
    if head_dim % size:
        raise ParameterError(f"{name}: must divide the head dimension {head_dim} of this model: {size}")


def quantise(groups: Tensor, dim: int, bits: int, stored: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and minima of groups that lie along `dim`; computed in the dtype of `groups`.

    scale = (max - min) / (2^bits - 1), code = round(clamp((x - min) / scale)), half to even, in this order, as KIVI
    does (arXiv:2402.02750, published code). A constant group has scale 0 and codes 0: it is decoded exactly. Codes
    are made with scales and minima as they are `stored`, so that rounding these costs next to nothing.

    Returns:
        Codes, uint8 and shaped as `groups`; scales and minima, `stored`, with size 1 along `dim`.
    """
    levels = 2**bits - 1
    minima = narrowed(groups.amin(dim, keepdim=True), stored)
    low = minima.to(groups.dtype)
    # The difference of finite numbers may be infinite; half of the largest leaves room to decode.
    spread = (groups.amax(dim, keepdim=True) - low).clamp(0, torch.finfo(groups.dtype).max / 2)
    scales = narrowed(spread / levels, stored)
    step = scales.to(groups.dtype)
    codes = (groups - low).div_(step.masked_fill(step == 0, torch.inf)).clamp_(0, levels).round_()
    return codes.to(torch.uint8), scales, minima


def dequantise(codes: Tensor, scales: Tensor, minima: Tensor, dtype: torch.dtype) -> Tensor:
    """Code · scale + minimum; computed in the working dtype of `dtype`, and rounded to `dtype`."""
    exact = working(dtype)
    return narrowed(codes.to(exact).mul_(scales.to(exact)).add_(minima.to(exact)), dtype)


def quantise_channels(vectors: Tensor, unit: int, bits: int, stored: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises each channel of `unit` consecutive tokens of [B, K, n, D].

    Returns:
        Packed codes, uint8 [B, K, n / unit, unit, bytes]; scales and minima, `stored` [B, K, n / unit, D].
    """
    if runs_kernels(vectors.device):
        with suppress(UnsupportedInputError):
            return affine_kernels.quantise_channels(vectors, unit, bits, stored)
    groups = vectors.to(working(vectors.dtype)).unflatten(2, (vectors.shape[2] // unit, unit))
    codes, scales, minima = quantise(groups, -2, bits, stored)
    return pack(codes, bits), scales.squeeze(-2), minima.squeeze(-2)


def quantise_tokens(vectors: Tensor, group: int, bits: int, stored: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises each `group` of neighbouring channels of the tokens of [B, K, n, D].

    Returns:
        Packed codes, uint8 [B, K, n, bytes]; scales and minima, `stored` [B, K, n, D / group].
    """
    if runs_kernels(vectors.device):
        with suppress(UnsupportedInputError):
            return affine_kernels.quantise_tokens(vectors, group, bits, stored)
    groups = vectors.to(working(vectors.dtype)).unflatten(-1, (vectors.shape[-1] // group, group))
    codes, scales, minima = quantise(groups, -1, bits, stored)
    return pack(codes.flatten(-2), bits), scales.squeeze(-1), minima.squeeze(-1)


def dequantise_channels(codes: Tensor, scales: Tensor, minima: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantise_channels`: [B, K, n, D]."""
    if runs_kernels(codes.device):
        with suppress(UnsupportedInputError):
            return affine_kernels.dequantise_channels(codes, scales, minima, bits, dtype)
    groups = unpack(codes, bits, scales.shape[-1])
    return dequantise(groups, scales.unsqueeze(-2), minima.unsqueeze(-2), dtype).flatten(2, 3)


def dequantise_tokens(codes: Tensor, scales: Tensor, minima: Tensor, dim: int, bits: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantise_tokens`: [B, K, n, D]."""
    if runs_kernels(codes.device):
        with suppress(UnsupportedInputError):
            return affine_kernels.dequantise_tokens(codes, scales, minima, dim, bits, dtype)
    groups = unpack(codes, bits, dim).unflatten(-1, (scales.shape[-1], dim // max(scales.shape[-1], 1)))
    return dequantise(groups, scales.unsqueeze(-1), minima.unsqueeze(-1), dtype).flatten(-2)
