"""What scores need beforehand, in one pass over the keys: log-sum-exps of the window's queries and sums over entries.

References: tests/kernels/references/scoring.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.builds import Build
from kvpolicy_kernels.launches import Launch, trips_of
from kvpolicy_kernels.logits import (
    FLOOR,
    TYPES,
    entries,
    is_candidate,
    packed_queries,
    products,
    storage,
    use_logits,
    use_sees,
)
from kvpolicy_kernels.passes import (
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
from kvpolicy_kernels.segments import Column, Segments
from kvpolicy_kernels.support import interpreting, require
from kvpolicy_kernels.tile import WindowUse
from kvpolicy_kernels.traffic import Traffic
from kvpolicy_kernels.window import Window

_RISE = tl.constexpr(64.0)  # how far logits to base 2 may exceed the maximum that they are held against


@triton.jit
def _folded(terms):
    """[BLOCK, N] summed to [32, N], over those rows only that one thread holds: no thread waits for another."""
    size: tl.constexpr = terms.shape[1]
    parts = tl.reshape(terms, (terms.shape[0] // 64, 4, 2, 8, size))
    return tl.reshape(tl.sum(tl.sum(parts, 2), 0), (32, size))


@triton.jit
def _more(top, total, logits):
    """Adds [BLOCK, N] logits to a running log-sum-exp: `total` [32, N] times 2 to the power of `top` [N].

    The maximum follows only when a logit is far above it: what is summed stays below 2^64, and is rescaled rarely.
    """
    if tl.max(tl.max(logits - top[None, :], 1), 0) > _RISE:
        higher = tl.maximum(top, tl.max(logits, 0))
        total = total * tl.exp2(top - higher)[None, :]
        top = higher
    return top, total + _folded(tl.exp2(logits - top[None, :]))


@triton.jit
def _log_sum(top, total):
    """[N], -inf where nothing was added."""
    summed = tl.sum(total, 0)
    nothing = summed == 0.0
    return tl.where(nothing, -float("inf"), top + tl.log2(tl.where(nothing, 1.0, summed)))


@triton.jit(do_not_specialize=["sinks", "recent", "span"])
def _statistics(
    KEYS,
    POSITIONS,
    VOTES,  # or None
    STARTS,
    LENGTHS,
    QUERIES,  # [P, GP, WP, D], or None
    ASKED,  # [L·B, WP], or None
    LSE,  # [P, splits, uses, GP·WP]
    SUMS,  # [P, splits, functions, D]
    factor,
    sinks,
    recent,
    span,
    TYPE: tl.constexpr,
    PER_LAYER: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    WP: tl.constexpr,
    USES: tl.constexpr,
    FUNCTIONS: tl.constexpr,
    KEY: tl.constexpr,  # noqa: ARG001 makes the sources of FUNCTIONS part of what the compiled kernel is known by
    TRIPS: tl.constexpr,  # of a loop, for the interpreter, which cannot count to a tensor; else None
    UPCAST: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    layer = segment // PER_LAYER
    start = tl.load(STARTS + segment)
    length = tl.load(LENGTHS + segment)
    key_storage = storage(KEYS, layer, TYPE)
    tops, totals, sums = (), (), ()
    if len(USES) > 0:
        queries = packed_queries(QUERIES, segment, GP * WP, D, DP)
        asked = tl.load(ASKED + segment // HEADS * WP + tl.arange(0, WP))
        position_storage = storage(POSITIONS, layer, tl.int32)
    for i in tl.static_range(len(USES)):
        tops = tops + (tl.full((tl.constexpr(USES[i][4]),), FLOOR, tl.float32),)
        totals = totals + (tl.zeros((32, tl.constexpr(USES[i][4])), tl.float32),)
    for _ in tl.static_range(len(FUNCTIONS)):
        sums = sums + (tl.zeros((DP,), tl.float32),)
    begin = tl.program_id(1) * span
    held = tl.maximum(0, tl.minimum(span, length - begin))
    for trip in tl.range(0, TRIPS if TRIPS is not None else tl.cdiv(held, BLOCK)):
        slots = begin + trip * BLOCK + tl.arange(0, BLOCK)
        inside = slots < length
        keys = entries(key_storage, start, slots, inside, D, DP)
        if len(USES) > 0:
            positions = tl.load(position_storage + start + slots, mask=inside, other=-1)
            candidate = is_candidate(positions, slots, length, sinks, recent)
            votes = None
            if VOTES is not None:
                votes = tl.load(storage(VOTES, layer, tl.float32) + start + slots, mask=inside, other=0.0)
            logits = products(keys, queries, factor, UPCAST)
            new_tops, new_totals = (), ()
            for i in tl.static_range(len(USES)):
                seen = use_sees(positions, inside, candidate, asked, GROUP, GP, tl.constexpr(USES[i]))
                own = use_logits(logits, votes, GP, WP, GROUP, tl.constexpr(USES[i]))
                own = tl.reshape(tl.where(seen, own, -float("inf")), (BLOCK, tl.constexpr(USES[i][4])))
                top, total = _more(tops[i], totals[i], own)
                new_tops = new_tops + (top,)
                new_totals = new_totals + (total,)
            tops, totals = new_tops, new_totals
        if len(FUNCTIONS) > 0:
            new_sums = ()
            for i in tl.static_range(len(FUNCTIONS)):
                terms = FUNCTIONS[i](keys.to(tl.float32))
                new_sums = new_sums + (sums[i] + tl.sum(tl.where(inside[:, None], terms, 0.0), 0),)
            sums = new_sums
    part = segment * tl.num_programs(1) + tl.program_id(1)
    place = tl.arange(0, DP)
    for i in tl.static_range(len(USES)):
        row = tl.arange(0, tl.constexpr(USES[i][4]))
        tl.store(LSE + (part * len(USES) + i) * (GP * WP) + row, _log_sum(tops[i], totals[i]))
    for i in tl.static_range(len(FUNCTIONS)):
        tl.store(SUMS + (part * len(FUNCTIONS) + i) * D + place, sums[i], mask=place < D)


@triton.jit(do_not_specialize=["splits"])
def _join(
    PART_LSE,  # [P, splits, uses, GP·WP]
    PART_SUMS,  # [P, splits, functions, D]
    LSE,  # [P, uses, GP·WP]
    SUMS,  # [P, functions, D]
    splits,
    D: tl.constexpr,
    DP: tl.constexpr,
    GP: tl.constexpr,
    WP: tl.constexpr,
    USES: tl.constexpr,
    FUNCTIONS: tl.constexpr,
    TRIPS: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(len(USES)):
        row = tl.arange(0, tl.constexpr(USES[i][4]))
        top, total = tl.full((row.shape[0],), FLOOR, tl.float32), tl.zeros((row.shape[0],), tl.float32)
        for split in tl.range(0, TRIPS if TRIPS is not None else splits):
            part = tl.load(PART_LSE + ((segment * splits + split) * len(USES) + i) * (GP * WP) + row)
            higher = tl.maximum(top, part)
            total = total * tl.exp2(top - higher) + tl.exp2(part - higher)
            top = higher
        tl.store(LSE + (segment * len(USES) + i) * (GP * WP) + row, _log_sum(top, total[None, :]))
    place = tl.arange(0, DP)
    for i in tl.static_range(FUNCTIONS):
        summed = tl.zeros((DP,), tl.float32)
        for split in tl.range(0, TRIPS if TRIPS is not None else splits):
            part = ((segment * splits + split) * FUNCTIONS + i) * D
            summed += tl.load(PART_SUMS + part + place, mask=place < D, other=0.0)
        tl.store(SUMS + (segment * FUNCTIONS + i) * D + place, summed, mask=place < D)


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
    yield Launch(_statistics, (segments.count, splits), arguments, {**constants, **trips}, shape.warps, shape.stages)
    if splits > 1:
        joined = {"PART_LSE": parts.lse, "PART_SUMS": parts.sums, "LSE": found.lse, "SUMS": found.sums}
        rest = {name: constants[name] for name in ("D", "DP", "GP", "WP", "USES")}
        rest |= {"FUNCTIONS": len(functions), "TRIPS": trips_of(splits)}
        yield Launch(_join, (segments.count,), {**joined, "splits": splits}, rest)


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
