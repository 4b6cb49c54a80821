"""Log-sum-exp of the window's queries and per-head sums over entries, in one pass over the keys before scoring.

References: tests/kernels/references/scoring.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from kvpolicy_kernels.common.addressing import TYPES
from kvpolicy_kernels.common.compile_spec import CompileSpec
from kvpolicy_kernels.common.launch import Launch, trips_of
from kvpolicy_kernels.common.protection import Protection
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import interpreting, require
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.score.checks import check_column, check_segments, check_vectors, check_window
from kvpolicy_kernels.score.launch_config import (
    LaunchConfig,
    asks_for_candidates,
    dim_of,
    geometry_of,
    label_of,
    launch_config_of,
    source_key,
    use_options,
)
from kvpolicy_kernels.score.statistics_kernel import combine_statistics, split_statistics
from kvpolicy_kernels.score.tile import WindowUse
from kvpolicy_kernels.score.window_queries import WindowQueries

_WIDE = 128  # queries, beyond which the logits of 64 entries do not fit the registers


@attrs.frozen(eq=False)
class Statistics:
    """Statistics of P segments, for the window uses and the statistic functions of a policy's tiles, in order."""

    lse: Tensor  # [P, uses, GP, WP] float32, base 2; uses that reduce the group write [P, use, 0] only
    sums: Tensor  # [P, functions, D] float32

    @classmethod
    def empty(
        cls, count: int, uses: int, functions: int, window: WindowQueries | None, dim: int, device: Any
    ) -> "Statistics":
        """Uninitialised, for `count` segments."""
        rows = (1, 1) if window is None else tuple(window.queries.shape[1:3])
        lse = torch.empty(count, uses, *rows, dtype=torch.float32, device=device)
        return cls(lse, torch.empty(count, functions, dim, dtype=torch.float32, device=device))


def statistics(
    segments: Segments,
    columns: Mapping[str, Column],
    window: WindowQueries | None,
    uses: Sequence[WindowUse],
    functions: Sequence[Any],
    *,
    sinks: int,
    recent: int,
    pinned: Tensor | None = None,
) -> Statistics:
    """Log-sum-exp of every query over the entries it sees, and the sum of every function over the entries of a head.

    Args:
        segments: P segments.
        columns: keys, positions and, if entries have votes, log_votes. Keys are read once.
        window: queries, required with `uses`.
        uses: of the window; the log-sum-exp is -inf for a query that sees nothing.
        functions: `@triton.jit` functions from keys [BLOCK, D] float32 to [BLOCK, D].
        sinks: positions below are no candidates.
        recent: the newest entries of a head that are no candidates.
        pinned: [P, T] bool or uint8 contiguous, slots that are no candidates either; None = no slot is.

    Raises:
        UnsupportedInputError: the kernels do not support these inputs; nothing was written.
    """
    check_segments(segments, sinks, recent)
    protection = Protection.of(segments, sinks, recent, pinned)
    require(len(uses) + len(functions) > 0, "nothing to compute")
    keys = check_vectors(columns, "keys", segments)
    if uses:
        window = check_window(window, keys, segments, uses)
        check_column(columns, "positions", segments, (torch.int32,), 1)
    if "log_votes" in columns:
        check_column(columns, "log_votes", segments, (torch.float32,), 1)
    out = Statistics.empty(
        segments.count, len(uses), len(functions), window if uses else None, keys.width, segments.starts.device
    )
    for launch in _launches(segments, columns, window if uses else None, uses, functions, protection, out):
        launch.run()
    return out


def _launches(
    segments: Segments,
    columns: Mapping[str, Column],
    window: WindowQueries | None,
    uses: Sequence[WindowUse],
    functions: Sequence[Any],
    protection: Protection,
    out: Statistics,
) -> Iterator[Launch]:
    keys = columns["keys"]
    config = _config(window, keys, functions)
    span, splits = config.split(segments.count, segments.longest)
    like = (len(uses), len(functions), window, keys.width, out.lse.device)
    pinned = label_of(uses, protection)
    parts = out if splits == 1 else Statistics.empty(segments.count * splits, *like)
    arguments = {
        "KEYS": keys.addresses,
        "POSITIONS": columns["positions"].addresses if uses else None,
        "VOTES": columns["log_votes"].addresses if uses and "log_votes" in columns else None,
        "STARTS": segments.starts,
        "LENGTHS": segments.lengths,
        "PINNED": pinned,
        "QUERIES": None if window is None else window.queries,
        "QUERY_POSITIONS": None if window is None else window.positions,
        "LSE": parts.lse,
        "SUMS": parts.sums,
        "factor": factor_of(window),
        "T": None if pinned is None else segments.longest,
        "sinks": protection.sinks,
        "recent": protection.recent,
        "span": span,
    }
    constants = _constants(segments, keys, window, uses, functions, config)
    trips = {"TRIPS": trips_of(span // config.block)}
    yield Launch(
        split_statistics, (segments.count, splits), arguments, {**constants, **trips}, config.warps, config.stages
    )
    if splits > 1:
        tensors = {"PART_LSE": parts.lse, "PART_SUMS": parts.sums, "LSE": out.lse, "SUMS": out.sums}
        sizes = {name: constants[name] for name in ("D", "DP", "GP", "WP", "USES")}
        sizes |= {"FUNCTIONS": len(functions), "TRIPS": trips_of(splits)}
        yield Launch(combine_statistics, (segments.count,), {**tensors, "splits": splits}, sizes)


def _config(window: WindowQueries | None, keys: Column, functions: Sequence[Any]) -> LaunchConfig:
    config = launch_config_of(window, keys, in_registers=len(functions) > 0, max_queries=64)
    _, group, width = geometry_of(window)
    return attrs.evolve(config, block=32) if group * width > _WIDE else config


def factor_of(window: WindowQueries | None) -> float:
    """Factor from q·k to logits to base 2."""
    return 0.0 if window is None else window.scaling * math.log2(math.e)


def _constants(
    segments: Segments,
    keys: Column,
    window: WindowQueries | None,
    uses: Sequence[WindowUse],
    functions: Sequence[Any],
    config: LaunchConfig,
) -> dict[str, Any]:
    group, padded_group, padded_width = geometry_of(window)
    return {
        "TYPE": TYPES[keys.dtype],
        "PER_LAYER": segments.per_layer,
        "HEADS": segments.heads,
        "D": keys.width,
        "DP": dim_of(keys.width),
        "BLOCK": config.block,
        "GROUP": group,
        "GP": padded_group,
        "WP": padded_width,
        "USES": tuple(use_options(use, padded_group, padded_width) for use in uses),
        "FUNCTIONS": tuple(functions),
        "KEY": source_key(functions),
        "UPCAST": interpreting(),
    }


def statistics_compile_specs(
    name: str,
    segments: Segments,
    columns: Mapping[str, Column],
    window: WindowQueries | None,
    uses: Sequence[WindowUse],
    functions: Sequence[Any],
    protection: Protection,
) -> Iterator[CompileSpec]:
    """The launches of `statistics` for these tensors, which may be on the meta device."""
    keys = columns["keys"]
    out = Statistics.empty(segments.count, len(uses), len(functions), window, keys.width, "meta")
    first, *combine = _launches(segments, columns, window, uses, functions, protection, out)
    yield first.compile_spec(f"statistics {name}", tensor_cores=bool(uses) and keys.dtype != torch.float32)
    for launch in combine:
        yield launch.compile_spec(f"statistics join {name}", wide_loads=False)


def traffic(
    segments: Segments,
    columns: Mapping[str, Column],
    window: WindowQueries | None,
    uses: Sequence[WindowUse],
    functions: Sequence[Any],
    lengths: Sequence[int],
    *,
    pinned: bool = False,
) -> Traffic:
    """Bytes of one `statistics` over heads of these lengths; the results are small and not counted.

    `pinned` says whether slots have a label.
    """
    keys, entries = columns["keys"], sum(lengths)
    _, splits = _config(window if uses else None, keys, functions).split(segments.count, segments.longest)
    read = {"keys": entries * keys.width * keys.dtype.itemsize}
    if uses and window is not None:
        read |= {"positions": 4 * entries, "queries": splits * window.queries.nbytes}
        if "log_votes" in columns:
            read["log_votes"] = 4 * entries
        if pinned and asks_for_candidates(uses):
            read["pinned"] = entries
    return Traffic(read, {}, 1 + (splits > 1))
