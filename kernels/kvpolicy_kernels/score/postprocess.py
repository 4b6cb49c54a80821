"""Postprocessing of scores (`tile.Postprocess`): softmax, pooling, normalisation and weight of each term, then the sum.

Up to three launches, each parallel over entries: softmax sums, normalisation sums, and the result.
References: tests/kernels/references/postprocess.py.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from kvpolicy_kernels.common.compile_spec import CompileSpec
from kvpolicy_kernels.common.launch import Launch
from kvpolicy_kernels.common.meta_inputs import meta_inputs
from kvpolicy_kernels.common.protection import Protection
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import require
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.score.checks import check_column, check_output, check_segments
from kvpolicy_kernels.score.postprocess_kernel import normalisation_parts, postprocess_terms, softmax_parts
from kvpolicy_kernels.score.tile import Postprocess
from kvpolicy_kernels.score.window_queries import power_of_two

_BLOCK = 512  # entries per program
_WARPS = 8
_MAX_SINKS = 4096
_MAX_PARTS = 8192
_MAX_POOL = 1023
_POOLS = ("none", "max", "average")
_NORMALS = ("none", "max", "standard")


@attrs.frozen
class _Encoded:
    """A `Postprocess` as kernels get it: a tuple of integers, in the order of these fields."""

    softmax: int  # index among the terms with a softmax, -1 = none
    pool: int
    size: int
    shared: bool
    normalise: int
    normal: int  # index among the terms that are normalised, -1 = none


def postprocess(
    segments: Segments,
    positions: Column,
    terms: Tensor,
    settings: Sequence[Postprocess],
    *,
    sinks: int,
    recent: int,
    pinned: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Postprocess the scores of all terms and sum them.

    Args:
        segments: P segments, whose entries are in ascending order of position.
        positions: int32, one per slot.
        terms: [terms, P, T] float32, scores of each term.
        settings: one per term.
        sinks: positions below are no candidates.
        recent: the newest entries of a head that are no candidates.
        pinned: [P, T] bool or uint8 contiguous, slots that are no candidates either; None = no slot is.
        out: [P, T] float32 contiguous, written in place.

    Returns:
        The sum [P, T] float32, -inf for slots that are no candidates and for candidates whose sum is NaN; and how many
        candidates were NaN, [P] int32.

    Raises:
        UnsupportedInputError: the kernels do not support these inputs; nothing was written.
    """
    count, longest, device = segments.count, segments.longest, segments.starts.device
    encoded = _check(segments, positions, terms, settings, sinks, recent)
    protection = Protection.of(segments, sinks, recent, pinned)
    if out is None:
        out = torch.empty(count, longest, dtype=torch.float32, device=device)
    check_output(out, "scores", (count, longest), torch.float32, device)
    nan = torch.empty(count, _parts(segments), dtype=torch.int32, device=device)
    for launch in _launches(segments, positions, terms, settings, encoded, protection, (out, nan)):
        launch.run()
    return out, nan[:, 0] if nan.shape[1] == 1 else nan.sum(1, dtype=torch.int32)


def _parts(segments: Segments) -> int:
    return -(-segments.longest // _BLOCK)


def _launches(
    segments: Segments,
    positions: Column,
    terms: Tensor,
    settings: Sequence[Postprocess],
    encoded: Sequence[_Encoded],
    protection: Protection,
    results: tuple[Tensor, Tensor],
) -> Iterator[Launch]:
    parts = _parts(segments)
    grid = (segments.count, parts)
    softmaxes = sum(term.softmax >= 0 for term in encoded)
    normals = sum(term.normal >= 0 for term in encoded)
    sums = torch.empty(softmaxes + normals, segments.count, parts, 2, dtype=torch.float32, device=terms.device)
    constants = _constants(segments, encoded, protection.sinks)
    sizes = {"T": segments.longest, "parts": parts}
    common = {"TERMS": terms, "LENGTHS": segments.lengths, "SOFTMAX": sums if softmaxes else None, **sizes}
    if softmaxes:
        yield Launch(softmax_parts, grid, common, {name: constants[name] for name in ("BLOCK", "SETTINGS")}, _WARPS)
    counts = None
    if normals and protection.pinned is not None:
        counts = torch.empty(segments.count, parts, dtype=torch.int32, device=terms.device)
    common |= {"POSITIONS": positions.addresses, "STARTS": segments.starts, "PINNED": protection.pinned}
    common |= {"sinks": protection.sinks, "recent": protection.recent}
    common |= {"NORMAL": sums[softmaxes:] if normals else None, "COUNTS": counts}
    if normals:
        yield Launch(normalisation_parts, grid, common, constants, _WARPS)
    weights = tuple(float(setting.weight) for setting in settings)
    results_and_weights = {"OUT": results[0], "NAN": results[1], "WEIGHTS": weights}
    yield Launch(postprocess_terms, grid, {**common, **results_and_weights}, constants, _WARPS)


def _check(
    segments: Segments, positions: Column, terms: Tensor, settings: Sequence[Postprocess], sinks: int, recent: int
) -> tuple[_Encoded, ...]:
    """The settings as kernels get them. Raises UnsupportedInputError for inputs that they do not support."""
    check_segments(segments, sinks, recent)
    check_column({"positions": positions}, "positions", segments, (torch.int32,), 1)
    shape = (len(settings), segments.count, segments.longest)
    require(len(settings) > 0, "nothing to postprocess")
    check_output(terms, "terms", shape, torch.float32, segments.starts.device)
    require(sinks <= _MAX_SINKS, f"more than {_MAX_SINKS} sinks")
    require(segments.longest <= _MAX_PARTS * _BLOCK, f"more than {_MAX_PARTS * _BLOCK} entries")
    return _encode(settings)


def _encode(settings: Sequence[Postprocess]) -> tuple[_Encoded, ...]:
    softmaxes, normals, encoded = 0, 0, []
    for setting in settings:
        require(setting.pool in _POOLS and setting.normalise in _NORMALS, f"an unknown postprocessing: {setting}")
        pools = setting.pool != "none"
        require(not pools or (setting.size % 2 == 1 and 0 < setting.size <= _MAX_POOL), f"a pool of {setting.size}")
        normal = _NORMALS.index(setting.normalise)
        encoded.append(
            _Encoded(
                softmaxes if setting.softmax else -1,
                _POOLS.index(setting.pool),
                setting.size if pools else 1,
                setting.shared,
                normal,
                normals if normal else -1,
            )
        )
        softmaxes, normals = softmaxes + setting.softmax, normals + (normal > 0)
    return tuple(encoded)


def _constants(segments: Segments, encoded: Sequence[_Encoded], sinks: int) -> dict[str, Any]:
    return {
        "PER_LAYER": segments.per_layer,
        "HEADS": segments.heads,
        "SP": power_of_two(_parts(segments)),
        "SINKS": power_of_two(sinks) if sinks else 0,
        "BLOCK": _BLOCK,
        "SETTINGS": tuple(tuple(map(int, attrs.astuple(term))) for term in encoded),
    }


def traffic(
    settings: Sequence[Postprocess],
    lengths: Sequence[int],
    longest: int,
    *,
    heads: int,
    sinks: int,
    recent: int,
    pinned: bool = False,
) -> Traffic:
    """Bytes of one `postprocess` over heads of these lengths that hold all sinks; `pinned` = slots have a label."""
    encoded = _encode(settings)
    covered = -(-longest // _BLOCK) * _BLOCK
    softmaxes = sum(term.softmax >= 0 for term in encoded) * sum(lengths)
    passes = [(term, 1 + (term.normal >= 0)) for term in encoded]
    read = sum(
        times * (heads if term.shared else 1) * _loads(term, length, covered, sinks, recent)
        for term, times in passes
        for length in lengths
    )
    normals = any(term.normal >= 0 for term in encoded)
    pooled = [times * (heads if term.shared else 1) for term, times in passes if term.pool]
    sink_reads = 1 + normals + sum(pooled)
    sink_slots = sum(min(sinks, length) for length in lengths) * -(-longest // _BLOCK)
    read_all = {"terms": 4 * (read + softmaxes), "positions": 4 * sink_reads * sink_slots}
    if pinned:
        inside = sum(max(0, length - recent - min(sinks, length)) for length in lengths)
        neighbours = sum(
            times * (heads if term.shared else 1) * _loads(term, length, covered, sinks, recent)
            for term, times in passes
            if term.pool
            for length in lengths
        )
        read_all["pinned"] = (1 + normals) * inside + neighbours
    return Traffic(read_all, {"scores": 4 * len(lengths) * longest}, 1 + (softmaxes > 0) + normals)


def _loads(term: _Encoded, length: int, covered: int, sinks: int, recent: int) -> int:
    """How many scores of one head all programs together load in one pass."""
    if term.pool == 0:
        return length
    first, last = min(sinks, length), length - recent
    offsets = range(-(term.size // 2), term.size // 2 + 1)
    return sum(max(0, min(last - offset, covered) - max(first - offset, 0)) for offset in offsets)


def compile_specs_for(
    name: str, settings: Sequence[Postprocess], *, sinks: int = 4, pinned: bool = False
) -> Iterator[CompileSpec]:
    """The launches of `postprocess` for these terms, for one row of a model with 32 layers of 8 KV heads.

    `pinned` says whether slots have a label; launches that do not read it are left out then.
    """
    segments, columns = meta_inputs(128, torch.bfloat16, 4)
    terms = torch.empty(len(settings), segments.count, segments.longest, dtype=torch.float32, device="meta")
    results = terms[0], torch.empty(segments.count, _parts(segments), dtype=torch.int32, device="meta")
    protection = Protection.meta(segments, sinks, 32, pinned=pinned)
    for launch in _launches(segments, columns["positions"], terms, settings, _encode(settings), protection, results):
        if pinned and launch.kernel is softmax_parts:
            continue
        kind = launch.kernel.__name__.replace("_terms", "").replace("_", " ")
        yield launch.compile_spec(f"{kind} {name}", wide_loads=False)


def compile_specs() -> Iterator[CompileSpec]:
    """Every kind of postprocessing at once, and none."""
    everything = Postprocess(softmax=True, pool="max", size=7, shared=True, normalise="standard")
    settings = (everything, Postprocess(pool="average", size=5, normalise="max"))
    yield from compile_specs_for("of everything", settings)
    yield from compile_specs_for("of one term", (Postprocess(),), sinks=0)
    yield from compile_specs_for("of everything pinned", settings, pinned=True)
    yield from compile_specs_for("of one term pinned", (Postprocess(),), sinks=0, pinned=True)
