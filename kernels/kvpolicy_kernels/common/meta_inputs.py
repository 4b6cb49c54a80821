"""Segments and columns on the meta device: shapes without data, to describe launches for compilation."""

import torch

from kvpolicy_kernels.common.segments import Column, Segments

_LAYERS, _HEADS = 32, 8
_LONGEST = 8192


def meta_inputs(head_dim: int, dtype: torch.dtype, group: int) -> tuple[Segments, dict[str, Column]]:
    """One row of a model with 32 layers of 8 KV heads, and every column that a score may read.

    Args:
        head_dim: D of keys and values.
        dtype: of keys and values.
        group: G, query heads per KV head; the width of the attention mass.
    """
    empty = torch.empty(_LAYERS * _HEADS, dtype=torch.int64, device="meta")
    segments = Segments(empty, empty.to(torch.int32), _LAYERS, 1, _HEADS, _LONGEST)
    shapes = {
        "keys": (dtype, head_dim),
        "values": (dtype, head_dim),
        "positions": (torch.int32, 1),
        "log_votes": (torch.float32, 1),
        "attention": (torch.float32, group),
    }
    columns = {name: Column(empty[:_LAYERS], kind, width, ()) for name, (kind, width) in shapes.items()}
    return segments, columns
