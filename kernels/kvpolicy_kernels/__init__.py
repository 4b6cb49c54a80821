"""Fused stages for a GPU: one Triton kernel a file, with its launcher and its guard. Knows nothing of kvpolicy.

This module and those it names import no Triton, so that plans can be explained where there is none.
"""

from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import UnsupportedInputError, obstacle
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.score.tile import ColumnRequest, Finish, Tile, WindowUse

__all__ = [
    "Column",
    "ColumnRequest",
    "Finish",
    "Segments",
    "Tile",
    "Traffic",
    "UnsupportedInputError",
    "WindowUse",
    "obstacle",
]
