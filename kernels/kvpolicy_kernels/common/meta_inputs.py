"""Segments, columns and windows that hold nothing and have a shape: what builds are made for."""

import torch

from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.score.window_queries import Window

_LAYERS, _HEADS = 32, 8
_LONGEST = 8192


def imagined(head_dim: int, dtype: torch.dtype, group: int) -> tuple[Segments, dict[str, Column]]:
    """One row of a model with 32 layers of 8 KV heads, and every column that a score may read."""
    empty = torch.empty(_LAYERS * _HEADS, dtype=torch.int64, device="meta")
    segments = Segments(empty, empty.to(torch.int32), _LAYERS, 1, _HEADS, _LONGEST)
    shapes = {
        "keys": (dtype, head_dim),
        "values": (dtype, head_dim),
        "positions": (torch.int32, 1),
        "log_votes": (torch.float32, 1),
        "attention": (torch.float32, group),
    }
    return segments, {name: Column(empty[:_LAYERS], kind, width, ()) for name, (kind, width) in shapes.items()}


def imagined_window(segments: Segments, head_dim: int, group: int, width: int, dtype: torch.dtype) -> Window:
    """`width` queries of every row."""
    queries = torch.empty(segments.rows, segments.heads * group, width, head_dim, dtype=dtype, device="meta")
    positions = torch.empty(segments.rows, width, dtype=torch.int32, device="meta")
    return Window.of([queries] * segments.layers, [positions] * segments.layers, segments, head_dim**-0.5)
