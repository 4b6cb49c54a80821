"""Functions of `affine` in Triton kernels. They raise UnsupportedInputError where torch must run instead."""

import torch
from torch import Tensor

Packed = tuple[Tensor, Tensor, Tensor]


def quantise_channels(vectors: Tensor, unit: int, bits: int, stored: torch.dtype) -> Packed:
    """As `affine.quantise_channels`."""
    from kvpolicy_kernels.quantise.quantise_channels import quantise_channels as launch

    return _unflattened(launch(vectors.flatten(0, 1), unit, bits, stored), vectors.shape[:2])


def quantise_tokens(vectors: Tensor, group: int, bits: int, stored: torch.dtype) -> Packed:
    """As `affine.quantise_tokens`."""
    from kvpolicy_kernels.quantise.quantise_tokens import quantise_tokens as launch

    return _unflattened(launch(vectors.flatten(0, 1), group, bits, stored), vectors.shape[:2])


def dequantise_channels(codes: Tensor, scales: Tensor, minima: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """As `affine.dequantise_channels`."""
    from kvpolicy_kernels.quantise.quantise_channels import dequantise_channels as launch

    found = launch(*_flattened(codes, scales, minima), bits, dtype)
    return found.view(*codes.shape[:2], *found.shape[1:])


def dequantise_tokens(codes: Tensor, scales: Tensor, minima: Tensor, dim: int, bits: int, dtype: torch.dtype) -> Tensor:
    """As `affine.dequantise_tokens`."""
    from kvpolicy_kernels.quantise.quantise_tokens import dequantise_tokens as launch

    found = launch(*_flattened(codes, scales, minima), dim, bits, dtype)
    return found.view(*codes.shape[:2], *found.shape[1:])


def _flattened(*parts: Tensor) -> Packed:
    codes, scales, minima = (part.flatten(0, 1).contiguous() for part in parts)
    return codes, scales, minima


def _unflattened(parts: Packed, outer: torch.Size) -> Packed:
    codes, scales, minima = (part.view(*outer, *part.shape[1:]) for part in parts)
    return codes, scales, minima
