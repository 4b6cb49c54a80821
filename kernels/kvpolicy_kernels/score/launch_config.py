"""How the score and statistics kernels divide entries among programs, and what they are compiled for."""

from collections.abc import Sequence
from typing import Any

import attrs
from torch import Tensor

from kvpolicy_kernels.common.protection import Protection
from kvpolicy_kernels.common.segments import Column
from kvpolicy_kernels.score.tile import Tile, WindowUse
from kvpolicy_kernels.score.window_queries import WindowQueries, power_of_two

REGIONS = ("all", "candidates")
GROUP_REDUCTIONS = ("none", "mean", "max", "sum")  # kernels get the index
_CONCURRENT_PROGRAMS = 528  # that an H200 runs at a time: 4 on each of its 132 multiprocessors
_MAX_BLOCKS = 16  # per program
_SHARED = 96 * 1024  # bytes of shared memory that every GPU from sm_80 on has, with a margin


@attrs.frozen
class LaunchConfig:
    """Block size, warps and pipeline stages of a kernel that reads keys."""

    block: int  # entries per iteration
    warps: int
    stages: int
    shared: int  # bytes of shared memory for queries and keys

    @classmethod
    def of(cls, queries: int, dim: int, size: int, *, in_registers: bool, max_queries: int) -> "LaunchConfig":
        """Choose for one launch.

        Args:
            queries: GP·WP, 0 without a window.
            dim: elements per key.
            size: bytes per element.
            in_registers: whether keys are also loaded to registers, not only read by tensor cores.
            max_queries: with more queries blocks are smaller.
        """
        row = dim_of(dim) * size
        block = 64 if in_registers or queries > max_queries else 128
        warps = 16 if queries > 128 else 8 if queries > 64 or row > 512 else 4
        stages = 2 if in_registers or (queries + 3 * block) * row > _SHARED else 3
        return cls(block, warps, stages, (queries + stages * block) * row)

    def split(self, count: int, longest: int) -> tuple[int, int]:
        """Entries per program, and programs per segment, for `count` segments of up to `longest` entries."""
        blocks = max(1, -(-longest // self.block))
        blocks_each = min(_MAX_BLOCKS, max(1, (blocks * count + _CONCURRENT_PROGRAMS // 2) // _CONCURRENT_PROGRAMS))
        splits = -(-blocks // blocks_each)
        return -(-blocks // splits) * self.block, splits

    def programs(self, lengths: Sequence[int], longest: int) -> list[int]:
        """For each segment, how many of its programs have an entry to read."""
        span, _ = self.split(len(lengths), longest)
        return [-(-length // span) for length in lengths]


def launch_config_of(
    window: WindowQueries | None, keys: Column | None, *, in_registers: bool, max_queries: int
) -> LaunchConfig:
    """For the queries of `window` and the `keys`, where they are read; the rest as in `LaunchConfig.of`."""
    _, group, width = geometry_of(window)
    dim, size = (1, 1) if keys is None else (keys.width, keys.dtype.itemsize)
    queries = 0 if window is None else group * width
    return LaunchConfig.of(queries, dim, size, in_registers=in_registers, max_queries=max_queries)


def geometry_of(window: WindowQueries | None) -> tuple[int, int, int]:
    """G, GP and WP."""
    return (1, 1, 1) if window is None else (window.group, *window.queries.shape[1:3])


def dim_of(width: int) -> int:
    """`width` padded to a power of two, at least 16: the smallest operand of `tl.dot`."""
    return max(16, power_of_two(width))


def window_uses_of(tiles: Sequence[Tile]) -> list[WindowUse]:
    """The distinct uses of the window, in order."""
    return list(dict.fromkeys(tile.window for tile in tiles if tile.window is not None))


def statistic_functions_of(tiles: Sequence[Tile]) -> list[Any]:
    """The distinct statistic functions, in order."""
    return list(dict.fromkeys(tile.statistic for tile in tiles if tile.statistic is not None))


def asks_for_candidates(uses: Sequence[WindowUse]) -> bool:
    """Whether any use of the window leaves protected entries out."""
    return any(use.region == "candidates" for use in uses)


def label_of(uses: Sequence[WindowUse], protection: Protection) -> Tensor | None:
    """The label that a kernel with these uses of the window reads, [P, T] uint8; None where it reads none."""
    return protection.pinned if asks_for_candidates(uses) else None


def use_options(use: WindowUse, group: int, width: int) -> tuple[int, int, int, int, int]:
    """A window use as kernels get it, for GP = `group` and WP = `width`.

    Queries, region, causal, group reduction, and how many rows of logits it has (WP if reduced, else GP·WP).
    """
    reduction = GROUP_REDUCTIONS.index(use.group)
    rows = width if reduction else group * width
    return use.queries, REGIONS.index(use.region), int(use.causal), reduction, rows


def source_key(functions: Sequence[Any]) -> str:
    """A string that changes with the sources of `functions`.

    Triton's disk cache keys functions in a tuple by name only; passed as a constant, this makes the key complete.
    """
    return "-".join(getattr(function, "cache_key", function.__name__) for function in functions)
