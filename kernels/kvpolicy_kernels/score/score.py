"""The fused score kernel's launcher: all tile functions of a policy in one pass over keys and, if read, values.

References: tests/kernels/references/scoring.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from kvpolicy_kernels.common.addressing import TYPES
from kvpolicy_kernels.common.compile_spec import CompileSpec
from kvpolicy_kernels.common.launch import Launch, trips_of
from kvpolicy_kernels.common.meta_inputs import meta_inputs
from kvpolicy_kernels.common.protection import Protection
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import interpreting, require
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.score.checks import check_column, check_output, check_segments, check_vectors, check_window
from kvpolicy_kernels.score.launch_config import (
    LaunchConfig,
    asks_for_candidates,
    dim_of,
    geometry_of,
    label_of,
    launch_config_of,
    source_key,
    statistic_functions_of,
    use_options,
    window_uses_of,
)
from kvpolicy_kernels.score.score_kernel import score
from kvpolicy_kernels.score.statistics import Statistics, factor_of, statistics, statistics_compile_specs
from kvpolicy_kernels.score.statistics import traffic as statistics_traffic
from kvpolicy_kernels.score.tile import Tile, WindowUse
from kvpolicy_kernels.score.window_queries import WindowQueries, power_of_two

_OPTIONAL = ("keys", "values", "votes", "attention")


@attrs.frozen(eq=False)
class _Inputs:
    """The checked columns and window that the tiles read; None where no tile does."""

    positions: Column
    keys: Column | None
    values: Column | None
    votes: Column | None
    attention: Column | None
    window: WindowQueries | None

    @classmethod
    def of(
        cls, segments: Segments, columns: Mapping[str, Column], window: WindowQueries | None, tiles: Sequence[Tile]
    ) -> "_Inputs":
        """Raises UnsupportedInputError for columns that are missing or that the kernels do not support."""
        uses, checked = window_uses_of(tiles), dict[str, Column]()
        checked["positions"] = check_column(columns, "positions", segments, (torch.int32,), 1)
        if uses or any(tile.keys or tile.statistic for tile in tiles):
            checked["keys"] = check_vectors(columns, "keys", segments)
        if any(tile.values for tile in tiles):
            checked["values"] = check_vectors(columns, "values", segments)
        if any(tile.attention for tile in tiles):
            checked["attention"] = check_vectors(columns, "attention", segments)
        if uses and "log_votes" in columns:
            checked["votes"] = check_column(columns, "log_votes", segments, (torch.float32,), 1)
        checked_window = check_window(window, checked["keys"], segments, uses) if uses else None
        return cls(checked.pop("positions"), **{name: checked.get(name) for name in _OPTIONAL}, window=checked_window)


def scores(
    segments: Segments,
    columns: Mapping[str, Column],
    window: WindowQueries | None,
    tiles: Sequence[Tile],
    extra: Sequence[Tensor | None],
    *,
    sinks: int,
    recent: int,
    pinned: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Scores of every tile before postprocessing.

    Args:
        segments: P segments, whose entries are in ascending order of position.
        columns: positions and, where tiles read them, keys, values, attention [slots, G] and log_votes.
        window: queries, required by tiles with a `window`.
        tiles: one per term of the score.
        extra: for each tile the result of its `column`, [P, T] float32, or None.
        sinks: positions below are no candidates.
        recent: the newest entries of a head that are no candidates.
        pinned: [P, T] bool or uint8 contiguous, slots that are no candidates either; None = no slot is.
        out: [tiles, P, T] float32 contiguous, written in place.

    Returns:
        [tiles, P, T] float32; 0 in empty slots.

    Raises:
        UnsupportedInputError: the kernels do not support these inputs; nothing was written.
    """
    check_segments(segments, sinks, recent)
    protection = Protection.of(segments, sinks, recent, pinned)
    require(len(tiles) == len(extra) > 0, "not one column for each tile, or no tile")
    inputs = _Inputs.of(segments, columns, window, tiles)
    device = segments.starts.device
    shape = (len(tiles), segments.count, segments.longest)
    for tile, column in zip(tiles, extra, strict=True):
        require((tile.column is None) == (column is None), "a tile lacks its column, or has one that it does not read")
        if column is not None:
            check_output(column, "a column", shape[1:], torch.float32, device)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=device)
    check_output(out, "scores", shape, torch.float32, device)
    uses, functions = window_uses_of(tiles), statistic_functions_of(tiles)
    computed = None
    if uses or functions:
        computed = statistics(
            segments, columns, inputs.window, uses, functions, sinks=sinks, recent=recent, pinned=pinned
        )
    extra_columns = [column for column in extra if column is not None]
    _launch(segments, inputs, computed, tiles, extra_columns, protection, out).run()
    return out


def _launch(
    segments: Segments,
    inputs: _Inputs,
    computed: Statistics | None,
    tiles: Sequence[Tile],
    extra: Sequence[Tensor],
    protection: Protection,
    out: Tensor,
) -> Launch:
    window, config = inputs.window, _config(inputs, tiles)
    span, splits = config.split(segments.count, segments.longest)
    arguments = {
        "KEYS": _addresses(inputs.keys),
        "VALUES": _addresses(inputs.values),
        "POSITIONS": inputs.positions.addresses,
        "VOTES": _addresses(inputs.votes),
        "ATTENTION": _addresses(inputs.attention),
        "STARTS": segments.starts,
        "LENGTHS": segments.lengths,
        "PINNED": label_of(window_uses_of(tiles), protection),
        "QUERIES": None if window is None else window.queries,
        "QUERY_POSITIONS": None if window is None else window.positions,
        "LSE": None if computed is None else computed.lse,
        "SUMS": None if computed is None else computed.sums,
        "EXTRA": tuple(extra) or None,
        "OUT": out,
        "ARGUMENTS": tuple(tuple(map(float, tile.arguments)) or (0.0,) for tile in tiles),
        "factor": factor_of(window),
        "T": segments.longest,
        "sinks": protection.sinks,
        "recent": protection.recent,
        "span": span,
    }
    constants = {**_constants(segments, inputs, tiles, config), "TRIPS": trips_of(span // config.block)}
    return Launch(score, (segments.count, splits), arguments, constants, config.warps, config.stages)


def _config(inputs: _Inputs, tiles: Sequence[Tile]) -> LaunchConfig:
    keys, values = any(tile.keys for tile in tiles), any(tile.values for tile in tiles)
    config = launch_config_of(inputs.window, inputs.keys, in_registers=keys or values, max_queries=128)
    if inputs.window is not None and keys and values:  # keys, values and logits do not fit the registers of 4 warps
        return attrs.evolve(config, warps=max(8, config.warps))
    return config


def _addresses(column: Column | None) -> Tensor | None:
    return None if column is None else column.addresses


def _constants(segments: Segments, inputs: _Inputs, tiles: Sequence[Tile], config: LaunchConfig) -> dict[str, Any]:
    uses, functions = window_uses_of(tiles), statistic_functions_of(tiles)
    group, padded_group, padded_width = geometry_of(inputs.window)
    if inputs.window is None and inputs.attention is not None:
        group = inputs.attention.width
    return {
        **_widths(inputs),
        "PER_LAYER": segments.per_layer,
        "HEADS": segments.heads,
        "HP": power_of_two(segments.heads),
        "BLOCK": config.block,
        "GROUP": group,
        "GP": padded_group,
        "WP": padded_width,
        "USES": tuple(use_options(use, padded_group, padded_width) for use in uses),
        "STATISTICS": len(functions),
        "FUNCTIONS": tuple(tile.function for tile in tiles),
        "OPTIONS": tuple(tile.options for tile in tiles),
        "READS": _tile_inputs(tiles, uses, functions),
        "KEY": source_key([tile.function for tile in tiles]),
        "UPCAST": interpreting(),
    }


def _widths(inputs: _Inputs) -> dict[str, Any]:
    names = (("", inputs.keys), ("V", inputs.values), ("M", inputs.attention))
    widths: dict[str, Any] = {}
    for name, column in names:
        width = 16 if column is None else column.width
        widths[f"D{name}"] = width
        widths[f"D{name}P"] = power_of_two(width) if name == "M" else dim_of(width)
        widths[f"{name}TYPE"] = TYPES[torch.float32 if column is None else column.dtype]
    return widths


def _tile_inputs(
    tiles: Sequence[Tile], uses: Sequence[WindowUse], functions: Sequence[Any]
) -> tuple[tuple[int, ...], ...]:
    """What each tile reads, as the kernel gets it: see its parameter READS."""
    encoded: list[tuple[int, ...]] = []
    columns = 0
    for tile in tiles:
        use = -1 if tile.window is None else uses.index(tile.window)
        statistic = -1 if tile.statistic is None else functions.index(tile.statistic)
        column = -1 if tile.column is None else columns
        columns += tile.column is not None
        encoded.append((*map(int, (tile.keys, tile.values, tile.newest, tile.attention)), use, statistic, column))
    return tuple(encoded)


def compile_specs_for(
    name: str,
    tiles: Sequence[Tile],
    *,
    head_dim: int,
    group: int,
    window: int,
    dtype: torch.dtype = torch.bfloat16,
    votes: bool = False,
    pinned: bool = False,
) -> Iterator[CompileSpec]:
    """The launches of `scores` for these tiles, with 8 KV heads of `group` query heads and `window` queries.

    `pinned` says whether slots have a label.
    """
    segments, columns = meta_inputs(head_dim, dtype, group)
    if not votes:
        columns.pop("log_votes")
    uses, functions = window_uses_of(tiles), statistic_functions_of(tiles)
    queries = WindowQueries.meta(segments, head_dim, group, window, dtype) if uses else None
    inputs, protection = _Inputs.of(segments, columns, queries, tiles), Protection.meta(segments, 4, 32, pinned=pinned)
    computed = None
    if uses or functions:
        yield from statistics_compile_specs(name, segments, columns, queries, uses, functions, protection)
        computed = Statistics.empty(segments.count, len(uses), len(functions), queries, head_dim, "meta")
    out = torch.empty(len(tiles), segments.count, segments.longest, dtype=torch.float32, device="meta")
    extra = [out[0] for tile in tiles if tile.column is not None]
    launch = _launch(segments, inputs, computed, tiles, extra, protection, out)
    wide = bool(inputs.keys or inputs.values)
    yield launch.compile_spec(f"score {name}", tensor_cores=bool(uses) and dtype != torch.float32, wide_loads=wide)


def compile_specs() -> Iterator[CompileSpec]:
    """A window score with votes, at usual head dims and window sizes."""
    from kvpolicy_kernels.score.tiles.attention import SCORES, attention_votes  # noqa: PLC0415 only used here

    for head_dim in (64, 128):
        for group, window in ((4, 32), (4, 8)):
            votes = Tile(attention_votes, (SCORES, 0, 0, 0), (0.0,), window=WindowUse(window), keys=False)
            name = f"D={head_dim} G={group} W={window}"
            yield from compile_specs_for(name, [votes], head_dim=head_dim, group=group, window=window, votes=True)
    candidates = Tile(attention_votes, (SCORES, 0, 0, 0), (0.0,), window=WindowUse(32, "candidates"), keys=False)
    yield from compile_specs_for("of candidates pinned", [candidates], head_dim=128, group=4, window=32, pinned=True)


def traffic(
    segments: Segments,
    columns: Mapping[str, Column],
    window: WindowQueries | None,
    tiles: Sequence[Tile],
    lengths: Sequence[int],
    *,
    pinned: bool = False,
) -> Traffic:
    """Bytes of one `scores` over heads of these lengths; tensors may be on the meta device.

    `pinned` says whether slots have a label.
    """
    uses, functions = window_uses_of(tiles), statistic_functions_of(tiles)
    inputs = _Inputs.of(segments, columns, window, tiles)
    _, splits = _config(inputs, tiles).split(segments.count, segments.longest)
    entries = sum(lengths)
    read_columns = {
        "keys": inputs.keys,
        "values": inputs.values,
        "log_votes": inputs.votes,
        "attention": inputs.attention,
    }
    read = {
        name: entries * column.width * column.dtype.itemsize
        for name, column in read_columns.items()
        if column is not None
    }
    read["positions"] = 4 * (entries + _newest_loads(tiles, lengths, segments.heads) * splits)
    if inputs.window is not None:
        read["queries"] = splits * inputs.window.queries.nbytes
    if pinned and asks_for_candidates(uses):
        read["pinned"] = entries
    if any(tile.column for tile in tiles):
        read["columns"] = 4 * entries * sum(tile.column is not None for tile in tiles)
    score_traffic = Traffic(read, {"scores": 4 * len(tiles) * segments.count * segments.longest})
    if not (uses or functions):
        return score_traffic
    before = statistics_traffic(segments, columns, inputs.window, uses, functions, lengths, pinned=pinned)
    return Traffic.total([before, score_traffic])


def _newest_loads(tiles: Sequence[Tile], lengths: Sequence[int], heads: int) -> int:
    """Positions that the first programs of all segments load to find the newest position of their row."""
    if not any(tile.newest for tile in tiles):
        return 0
    return heads * sum(length > 0 for length in lengths)
