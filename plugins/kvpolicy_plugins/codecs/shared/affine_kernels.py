"""Functions of `affine` in Triton kernels. They raise UnsupportedInputError where torch must run instead."""

import torch
from torch import Tensor

Packed = tuple[Tensor, Tensor, Tensor]


def quantise_channels(vectors: Tensor, group_size: int, bits: int, stored: torch.dtype) -> Packed:
    """As `affine.quantise_channels`."""
    from kvpolicy_kernels.quantise.quantise_channels import quantise_channels as launch

    return _unflattened(launch(vectors.flatten(0, 1), group_size, bits, stored), vectors.shape[:2])


def quantise_tokens(vectors: Tensor, group: int, bits: int, stored: torch.dtype) -> Packed:
    """As `affine.quantise_tokens`."""
    from kvpolicy_kernels.quantise.quantise_tokens import quantise_tokens as launch

    return _unflattened(launch(vectors.flatten(0, 1), group, bits, stored), vectors.shape[:2])


def dequantise_channels(codes: Tensor, scales: Tensor, minima: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """As `affine.dequantise_channels`."""
    from kvpolicy_kernels.quantise.quantise_channels import dequantise_channels as launch

    vectors = launch(*_flattened(codes, scales, minima), bits, dtype)
    return vectors.view(*codes.shape[:2], *vectors.shape[1:])


def dequantise_tokens(codes: Tensor, scales: Tensor, minima: Tensor, dim: int, bits: int, dtype: torch.dtype) -> Tensor:
    """As `affine.dequantise_tokens`."""
    from kvpolicy_kernels.quantise.quantise_tokens import dequantise_tokens as launch

    vectors = launch(*_flattened(codes, scales, minima), dim, bits, dtype)
    return vectors.view(*codes.shape[:2], *vectors.shape[1:])


def _flattened(*columns: Tensor) -> Packed:
    codes, scales, minima = (column.flatten(0, 1).contiguous() for column in columns)
    return codes, scales, minima


def _unflattened(columns: Packed, outer: torch.Size) -> Packed:
    codes, scales, minima = (column.view(*outer, *column.shape[1:]) for column in columns)
    return codes, scales, minima
