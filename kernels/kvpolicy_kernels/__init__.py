"""Triton kernels for the stages of a policy, one per file with its launcher and input checks. Imports no kvpolicy.

This module and those that it imports do not import Triton, so that plans can be explained without it.
"""

from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import UnsupportedInputError, unavailable_reason
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.score.tile import ColumnRequest, Postprocess, Tile, WindowUse

__all__ = [
    "Column",
    "ColumnRequest",
    "Postprocess",
    "Segments",
    "Tile",
    "Traffic",
    "UnsupportedInputError",
    "WindowUse",
    "unavailable_reason",
]
