"""All scores of a policy in one pass over keys, and values where one reads them: every tile function in one kernel.

References: tests/kernels/references/scoring.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from kvpolicy_kernels.common.compile_spec import Build
from kvpolicy_kernels.common.launch import Launch, trips_of
from kvpolicy_kernels.common.meta_inputs import imagined, imagined_window
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import interpreting, require
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.score.launch_config import (
    Pass,
    check_column,
    check_output,
    check_rows,
    check_segments,
    check_window,
    dim_of,
    functions_of,
    geometry_of,
    key_of,
    pass_of,
    use_options,
    uses_of,
)
from kvpolicy_kernels.score.logits import TYPES
from kvpolicy_kernels.score.score_kernel import score
from kvpolicy_kernels.score.statistics import Statistics, factor_of, statistics, statistics_builds
from kvpolicy_kernels.score.statistics import traffic as statistics_traffic
from kvpolicy_kernels.score.tile import Tile, WindowUse
from kvpolicy_kernels.score.window_queries import Window, power_of_two

_OPTIONAL = ("keys", "values", "votes", "attention")


@attrs.frozen(eq=False)
class _Reads:
    """What the tiles read, checked; None for what none reads."""

    positions: Column
    keys: Column | None
    values: Column | None
    votes: Column | None
    attention: Column | None
    window: Window | None

    @classmethod
    def of(
        cls, segments: Segments, columns: Mapping[str, Column], window: Window | None, tiles: Sequence[Tile]
    ) -> "_Reads":
        """Raises UnsupportedInputError for what the kernels cannot read."""
        uses, found = uses_of(tiles), dict[str, Column]()
        found["positions"] = check_column(columns, "positions", segments, (torch.int32,), 1)
        if uses or any(tile.keys or tile.statistic for tile in tiles):
            found["keys"] = check_rows(columns, "keys", segments)
        if any(tile.values for tile in tiles):
            found["values"] = check_rows(columns, "values", segments)
        if any(tile.attention for tile in tiles):
            found["attention"] = check_rows(columns, "attention", segments)
        if uses and "log_votes" in columns:
            found["votes"] = check_column(columns, "log_votes", segments, (torch.float32,), 1)
        used = check_window(window, found["keys"], segments, uses) if uses else None
        return cls(found.pop("positions"), **{name: found.get(name) for name in _OPTIONAL}, window=used)


def scores(
    segments: Segments,
    columns: Mapping[str, Column],
    window: Window | None,
    tiles: Sequence[Tile],
    extra: Sequence[Tensor | None],
    *,
    sinks: int,
    recent: int,
    out: Tensor | None = None,
) -> Tensor:
    """The scores of every tile before their `finish`, [tiles, P, T] float32; 0 in slots that hold nothing.

    `columns` are positions and, as far as tiles read them, keys, values, attention [slots, G] and log_votes; `extra`
    is what `tile.column` gave for each tile, [P, T] float32. Candidates are held entries other than those at positions
    below `sinks` and the newest `recent` of a head; entries stand in ascending order of position.

    Raises:
        UnsupportedInputError: before anything is written, for what the kernels cannot do.
    """
    check_segments(segments, sinks, recent)
    require(len(tiles) == len(extra) > 0, "not one column for each tile, or no tile")
    reads = _Reads.of(segments, columns, window, tiles)
    device = segments.starts.device
    shape = (len(tiles), segments.count, segments.longest)
    for tile, column in zip(tiles, extra, strict=True):
        require((tile.column is None) == (column is None), "a tile lacks its column, or has one that it does not read")
        if column is not None:
            check_output(column, "a column", shape[1:], torch.float32, device)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=device)
    check_output(out, "scores", shape, torch.float32, device)
    uses, functions = uses_of(tiles), functions_of(tiles)
    before = None
    if uses or functions:
        before = statistics(segments, columns, reads.window, uses, functions, sinks=sinks, recent=recent)
    given = [column for column in extra if column is not None]
    _launch(segments, reads, before, tiles, given, (sinks, recent), out).run()
    return out


def _launch(
    segments: Segments,
    reads: _Reads,
    before: Statistics | None,
    tiles: Sequence[Tile],
    extra: Sequence[Tensor],
    protect: tuple[int, int],
    out: Tensor,
) -> Launch:
    window, shape = reads.window, _shape(reads, tiles)
    span, splits = shape.cut(segments.count, segments.longest)
    arguments = {
        "KEYS": _addresses(reads.keys),
        "VALUES": _addresses(reads.values),
        "POSITIONS": reads.positions.addresses,
        "VOTES": _addresses(reads.votes),
        "ATTENTION": _addresses(reads.attention),
        "STARTS": segments.starts,
        "LENGTHS": segments.lengths,
        "QUERIES": None if window is None else window.queries,
        "ASKED": None if window is None else window.positions,
        "LSE": None if before is None else before.lse,
        "SUMS": None if before is None else before.sums,
        "EXTRA": tuple(extra) or None,
        "OUT": out,
        "ARGUMENTS": tuple(tuple(map(float, tile.arguments)) or (0.0,) for tile in tiles),
        "factor": factor_of(window),
        "T": segments.longest,
        "sinks": protect[0],
        "recent": protect[1],
        "span": span,
    }
    constants = {**_constants(segments, reads, tiles, shape), "TRIPS": trips_of(span // shape.block)}
    return Launch(score, (segments.count, splits), arguments, constants, shape.warps, shape.stages)


def _shape(reads: _Reads, tiles: Sequence[Tile]) -> Pass:
    keys, values = any(tile.keys for tile in tiles), any(tile.values for tile in tiles)
    shape = pass_of(reads.window, reads.keys, held=keys or values, widest=128)
    if reads.window is not None and keys and values:  # both beside the logits: four warps lack the registers
        return attrs.evolve(shape, warps=max(8, shape.warps))
    return shape


def _addresses(column: Column | None) -> Tensor | None:
    return None if column is None else column.addresses


def _constants(segments: Segments, reads: _Reads, tiles: Sequence[Tile], shape: Pass) -> dict[str, Any]:
    uses, statistics_ = uses_of(tiles), functions_of(tiles)
    group, padded_group, padded_width = geometry_of(reads.window)
    if reads.window is None and reads.attention is not None:
        group = reads.attention.width
    return {
        **_widths(reads),
        "PER_LAYER": segments.per_layer,
        "HEADS": segments.heads,
        "HP": power_of_two(segments.heads),
        "BLOCK": shape.block,
        "GROUP": group,
        "GP": padded_group,
        "WP": padded_width,
        "USES": tuple(use_options(use, padded_group, padded_width) for use in uses),
        "STATISTICS": len(statistics_),
        "FUNCTIONS": tuple(tile.function for tile in tiles),
        "OPTIONS": tuple(tile.options for tile in tiles),
        "READS": _reads(tiles, uses, statistics_),
        "KEY": key_of([tile.function for tile in tiles]),
        "UPCAST": interpreting(),
    }


def _widths(reads: _Reads) -> dict[str, Any]:
    names = (("", reads.keys), ("V", reads.values), ("M", reads.attention))
    widths: dict[str, Any] = {}
    for name, column in names:
        width = 16 if column is None else column.width
        widths[f"D{name}"] = width
        widths[f"D{name}P"] = power_of_two(width) if name == "M" else dim_of(width)
        widths[f"{name}TYPE"] = TYPES[torch.float32 if column is None else column.dtype]
    return widths


def _reads(tiles: Sequence[Tile], uses: Sequence[WindowUse], statistics_: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    found: list[tuple[int, ...]] = []
    columns = 0
    for tile in tiles:
        use = -1 if tile.window is None else uses.index(tile.window)
        statistic = -1 if tile.statistic is None else statistics_.index(tile.statistic)
        column = -1 if tile.column is None else columns
        columns += tile.column is not None
        found.append((*map(int, (tile.keys, tile.values, tile.newest, tile.attention)), use, statistic, column))
    return tuple(found)


def builds_for(
    name: str,
    tiles: Sequence[Tile],
    *,
    head_dim: int,
    group: int,
    window: int,
    dtype: torch.dtype = torch.bfloat16,
    votes: bool = False,
) -> Iterator[Build]:
    """The kernels that `scores` launches for these tiles: 8 KV heads of `group` query heads, `window` queries."""
    segments, columns = imagined(head_dim, dtype, group)
    if not votes:
        columns.pop("log_votes")
    uses, functions = uses_of(tiles), functions_of(tiles)
    queries = imagined_window(segments, head_dim, group, window, dtype) if uses else None
    reads = _Reads.of(segments, columns, queries, tiles)
    before = None
    if uses or functions:
        yield from statistics_builds(name, segments, columns, queries, uses, functions)
        before = Statistics.empty(segments.count, len(uses), len(functions), queries, head_dim, "meta")
    out = torch.empty(len(tiles), segments.count, segments.longest, dtype=torch.float32, device="meta")
    extra = [out[0] for tile in tiles if tile.column is not None]
    launch = _launch(segments, reads, before, tiles, extra, (4, 32), out)
    wide = bool(reads.keys or reads.values)
    yield launch.build(f"score {name}", tensor_cores=bool(uses) and dtype != torch.float32, wide_loads=wide)


def builds() -> Iterator[Build]:
    """A tile of every kind of input, at the head dims of most models."""
    from kvpolicy_kernels.score.tiles.attention import SCORES, attention_votes  # noqa: PLC0415 they are examples here

    for head_dim in (64, 128):
        for group, window in ((4, 32), (4, 8)):
            votes = Tile(attention_votes, (SCORES, 0, 0, 0), (0.0,), window=WindowUse(window), keys=False)
            name = f"D={head_dim} G={group} W={window}"
            yield from builds_for(name, [votes], head_dim=head_dim, group=group, window=window, votes=True)


def traffic(
    segments: Segments,
    columns: Mapping[str, Column],
    window: Window | None,
    tiles: Sequence[Tile],
    lengths: Sequence[int],
) -> Traffic:
    """Bytes of one `scores` over heads that hold `lengths` entries each; only shapes of the tensors are looked at."""
    uses, functions = uses_of(tiles), functions_of(tiles)
    reads = _Reads.of(segments, columns, window, tiles)
    _, splits = _shape(reads, tiles).cut(segments.count, segments.longest)
    held = sum(lengths)
    given = {"keys": reads.keys, "values": reads.values, "log_votes": reads.votes, "attention": reads.attention}
    read = {name: held * one.width * one.dtype.itemsize for name, one in given.items() if one is not None}
    read["positions"] = 4 * (held + _newest_loads(tiles, lengths, segments.heads) * splits)
    if reads.window is not None:
        read["queries"] = splits * reads.window.queries.nbytes
    if any(tile.column for tile in tiles):
        read["columns"] = 4 * held * sum(tile.column is not None for tile in tiles)
    own = Traffic(read, {"scores": 4 * len(tiles) * segments.count * segments.longest})
    if not (uses or functions):
        return own
    return Traffic.total([statistics_traffic(segments, columns, reads.window, uses, functions, lengths), own])


def _newest_loads(tiles: Sequence[Tile], lengths: Sequence[int], heads: int) -> int:
    """Positions that one program of every segment loads to find the newest of its row."""
    if not any(tile.newest for tile in tiles):
        return 0
    return heads * sum(length > 0 for length in lengths)
