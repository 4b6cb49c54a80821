"""What scores need beforehand, in one pass over the keys: log-sum-exps of the window's queries and sums over entries.

References: tests/kernels/references/scoring.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from kvpolicy_kernels.common.compile_spec import Build
from kvpolicy_kernels.common.launch import Launch, trips_of
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import interpreting, require
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.score.launch_config import (
    Pass,
    check_column,
    check_rows,
    check_segments,
    check_window,
    dim_of,
    geometry_of,
    key_of,
    pass_of,
    use_options,
)
from kvpolicy_kernels.score.logits import TYPES
from kvpolicy_kernels.score.statistics_kernel import join_parts, statistics_of_parts
from kvpolicy_kernels.score.tile import WindowUse
from kvpolicy_kernels.score.window_queries import Window


@attrs.frozen(eq=False)
class Statistics:
    """Of every segment, for the uses of the window and the statistics of a policy's tiles, in their order."""

    lse: Tensor  # [P, uses, GP, WP] float32, base 2; a use that reduces the group fills [P, use, 0] only
    sums: Tensor  # [P, functions, D] float32

    @classmethod
    def empty(cls, count: int, uses: int, functions: int, window: Window | None, dim: int, device: Any) -> "Statistics":
        """Room for `count` segments, not filled."""
        rows = (1, 1) if window is None else tuple(window.queries.shape[1:3])
        lse = torch.empty(count, uses, *rows, dtype=torch.float32, device=device)
        return cls(lse, torch.empty(count, functions, dim, dtype=torch.float32, device=device))


def statistics(
    segments: Segments,
    columns: Mapping[str, Column],
    window: Window | None,
    uses: Sequence[WindowUse],
    functions: Sequence[Any],
    *,
    sinks: int,
    recent: int,
) -> Statistics:
    """Log-sum-exp of every query over what it sees (-inf: nothing), and the sum of every function over held entries.

    `columns` are keys, positions and, where entries carry votes, log_votes. Keys are read once.

    Raises:
        UnsupportedInputError: before anything is written, for what the kernel cannot do.
    """
    check_segments(segments, sinks, recent)
    require(len(uses) + len(functions) > 0, "nothing to compute")
    keys = check_rows(columns, "keys", segments)
    if uses:
        window = check_window(window, keys, segments, uses)
        check_column(columns, "positions", segments, (torch.int32,), 1)
    if "log_votes" in columns:
        check_column(columns, "log_votes", segments, (torch.float32,), 1)
    found = Statistics.empty(
        segments.count, len(uses), len(functions), window if uses else None, keys.width, segments.starts.device
    )
    for launch in _launches(segments, columns, window if uses else None, uses, functions, (sinks, recent), found):
        launch.run()
    return found


def _launches(
    segments: Segments,
    columns: Mapping[str, Column],
    window: Window | None,
    uses: Sequence[WindowUse],
    functions: Sequence[Any],
    protect: tuple[int, int],
    found: Statistics,
) -> Iterator[Launch]:
    keys = columns["keys"]
    shape = _shape(window, keys, functions)
    span, splits = shape.cut(segments.count, segments.longest)
    sizes = (len(uses), len(functions), window, keys.width, found.lse.device)
    parts = found if splits == 1 else Statistics.empty(segments.count * splits, *sizes)
    arguments = {
        "KEYS": keys.addresses,
        "POSITIONS": columns["positions"].addresses if uses else None,
        "VOTES": columns["log_votes"].addresses if uses and "log_votes" in columns else None,
        "STARTS": segments.starts,
        "LENGTHS": segments.lengths,
        "QUERIES": None if window is None else window.queries,
        "ASKED": None if window is None else window.positions,
        "LSE": parts.lse,
        "SUMS": parts.sums,
        "factor": factor_of(window),
        "sinks": protect[0],
        "recent": protect[1],
        "span": span,
    }
    constants = _constants(segments, keys, window, uses, functions, shape)
    trips = {"TRIPS": trips_of(span // shape.block)}
    yield Launch(
        statistics_of_parts, (segments.count, splits), arguments, {**constants, **trips}, shape.warps, shape.stages
    )
    if splits > 1:
        joined = {"PART_LSE": parts.lse, "PART_SUMS": parts.sums, "LSE": found.lse, "SUMS": found.sums}
        rest = {name: constants[name] for name in ("D", "DP", "GP", "WP", "USES")}
        rest |= {"FUNCTIONS": len(functions), "TRIPS": trips_of(splits)}
        yield Launch(join_parts, (segments.count,), {**joined, "splits": splits}, rest)


def _shape(window: Window | None, keys: Column, functions: Sequence[Any]) -> Pass:
    return pass_of(window, keys, held=len(functions) > 0, widest=64)


def factor_of(window: Window | None) -> float:
    """What turns q·k into logits to base 2."""
    return 0.0 if window is None else window.scaling * math.log2(math.e)


def _constants(
    segments: Segments,
    keys: Column,
    window: Window | None,
    uses: Sequence[WindowUse],
    functions: Sequence[Any],
    shape: Pass,
) -> dict[str, Any]:
    group, padded_group, padded_width = geometry_of(window)
    return {
        "TYPE": TYPES[keys.dtype],
        "PER_LAYER": segments.per_layer,
        "HEADS": segments.heads,
        "D": keys.width,
        "DP": dim_of(keys.width),
        "BLOCK": shape.block,
        "GROUP": group,
        "GP": padded_group,
        "WP": padded_width,
        "USES": tuple(use_options(use, padded_group, padded_width) for use in uses),
        "FUNCTIONS": tuple(functions),
        "KEY": key_of(functions),
        "UPCAST": interpreting(),
    }


def statistics_builds(
    name: str,
    segments: Segments,
    columns: Mapping[str, Column],
    window: Window | None,
    uses: Sequence[WindowUse],
    functions: Sequence[Any],
) -> Iterator[Build]:
    """What `statistics` launches for such tensors, which may be on the meta device."""
    keys = columns["keys"]
    found = Statistics.empty(segments.count, len(uses), len(functions), window, keys.width, "meta")
    first, *join = _launches(segments, columns, window, uses, functions, (4, 32), found)
    yield first.build(f"statistics {name}", tensor_cores=bool(uses) and keys.dtype != torch.float32)
    for launch in join:
        yield launch.build(f"statistics join {name}", wide_loads=False)


def traffic(
    segments: Segments,
    columns: Mapping[str, Column],
    window: Window | None,
    uses: Sequence[WindowUse],
    functions: Sequence[Any],
    lengths: Sequence[int],
) -> Traffic:
    """Bytes of one `statistics` over heads that hold `lengths` entries each; what is found is small and left out."""
    keys, held = columns["keys"], sum(lengths)
    _, splits = _shape(window if uses else None, keys, functions).cut(segments.count, segments.longest)
    read = {"keys": held * keys.width * keys.dtype.itemsize}
    if uses and window is not None:
        read |= {"positions": 4 * held, "queries": splits * window.queries.nbytes}
        if "log_votes" in columns:
            read["log_votes"] = 4 * held
    return Traffic(read, {}, 1 + (splits > 1))
