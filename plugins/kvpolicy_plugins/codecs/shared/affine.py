"""Asymmetric affine quantisation: groups of numbers as codes between their minimum and maximum."""

from contextlib import suppress

import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Choice
from kvpolicy_kernels import UnsupportedInputError
from kvpolicy_plugins.codecs.shared import affine_kernels
from kvpolicy_plugins.codecs.shared.packing import pack, unpack
from kvpolicy_plugins.shared.kernel_device import runs_kernels

BITS = Choice((2, 4, 8))
SCALES = Choice(("half", "full"))
_LEAST_SCALE = 1e-8


def scale_dtype(scales: str, dtype: torch.dtype) -> torch.dtype:
    """Dtype of scales and minima: float16 for `half`, the model's `dtype` for `full`."""
    return torch.float16 if scales == "half" else dtype


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype to quantise in: float32, or float64 for float64. Half precision cannot represent 256 codes exactly."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast_clamped(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers cast to `dtype`; values beyond the range of float16 are clamped to it instead of becoming infinite."""
    if dtype == torch.float16 != numbers.dtype:
        limit = torch.finfo(dtype).max
        numbers = numbers.clamp(-limit, limit)
    return numbers.to(dtype)


def check_divides(name: str, size: int, head_dim: int) -> None:
    """Check that groups divide the vectors of a model.

    Raises:
        ParameterError: `size` does not divide `head_dim`.
    """
    if head_dim % size:
        raise ParameterError(f"{name}: must divide the head dimension {head_dim} of this model: {size}")


def quantise(groups: Tensor, dim: int, bits: int, stored: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and minima of groups that lie along `dim`; computed in the dtype of `groups`.

    scale = (max - min) / (2^bits - 1), code = round(clamp((x - min) / scale)), half to even, in this order, as KIVI
    does (arXiv:2402.02750, published code). A constant group has scale 0 and codes 0, and is decoded exactly. Codes are
    computed from the rounded scales and minima, so that their rounding adds almost no error.

    Returns:
        Codes, uint8 and shaped as `groups`; scales and minima, `stored`, with size 1 along `dim`.
    """
    levels = 2**bits - 1
    minima = cast_clamped(groups.amin(dim, keepdim=True), stored)
    low = minima.to(groups.dtype)
    # The difference of finite numbers may be infinite; half of the largest keeps decoding finite.
    spread = (groups.amax(dim, keepdim=True) - low).clamp(0, torch.finfo(groups.dtype).max / 2)
    scales = cast_clamped(spread / levels, stored)
    step = scales.to(groups.dtype)
    codes = (groups - low).div_(step.masked_fill(step == 0, torch.inf)).clamp_(0, levels).round_()
    return codes.to(torch.uint8), scales, minima


def quantise_half_up(vectors: Tensor, bits: int, stored: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise each vector of [B, K, n, D] as one group; computed in `compute_dtype`.

    code = floor((x - min) / scale + 1/2), with the scale and the minimum before they are rounded to `stored`, as vLLM
    does for TurboQuant. The scale is 1e-8 at least, which is 0 in float16: equal numbers are decoded to the minimum.

    Returns:
        Packed codes, uint8 [B, K, n, bytes]; scales and minima, `stored` [B, K, n, 1].
    """
    exact = vectors.to(compute_dtype(vectors.dtype))
    low, levels = exact.amin(-1, keepdim=True), 2**bits - 1
    # The difference of finite numbers may be infinite; half of the largest keeps decoding finite.
    spread = (exact.amax(-1, keepdim=True) - low).clamp(max=torch.finfo(exact.dtype).max / 2)
    scale = (spread / levels).clamp(min=_LEAST_SCALE)
    codes = ((exact - low) / scale).add_(0.5).floor_().clamp_(0, levels).to(torch.uint8)
    return pack(codes, bits), cast_clamped(scale, stored), cast_clamped(low, stored)


def dequantise(codes: Tensor, scales: Tensor, minima: Tensor, dtype: torch.dtype) -> Tensor:
    """Code · scale + minimum, computed in `compute_dtype(dtype)` and rounded to `dtype`."""
    return cast_clamped(codes.to(compute_dtype(dtype)).mul_(scales).add_(minima), dtype)


def quantise_channels(
    vectors: Tensor, group_size: int, bits: int, stored: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise each channel of every `group_size` consecutive tokens of [B, K, n, D].

    Returns:
        Packed codes, uint8 [B, K, n / group_size, group_size, bytes]; scales and minima, `stored`
        [B, K, n / group_size, D].
    """
    if runs_kernels(vectors.device):
        with suppress(UnsupportedInputError):
            return affine_kernels.quantise_channels(vectors, group_size, bits, stored)
    groups = vectors.to(compute_dtype(vectors.dtype)).unflatten(2, (vectors.shape[2] // group_size, group_size))
    codes, scales, minima = quantise(groups, -2, bits, stored)
    return pack(codes, bits), scales.squeeze(-2), minima.squeeze(-2)


def quantise_tokens(vectors: Tensor, group: int, bits: int, stored: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise every `group` consecutive channels of each token of [B, K, n, D].

    Returns:
        Packed codes, uint8 [B, K, n, bytes]; scales and minima, `stored` [B, K, n, D / group].
    """
    if runs_kernels(vectors.device):
        with suppress(UnsupportedInputError):
            return affine_kernels.quantise_tokens(vectors, group, bits, stored)
    groups = vectors.to(compute_dtype(vectors.dtype)).unflatten(-1, (vectors.shape[-1] // group, group))
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
