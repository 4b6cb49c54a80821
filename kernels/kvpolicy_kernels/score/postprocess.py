"""From the scores of all terms to one: softmax, pooling, normalisation and weights (`tile.Finish`), summed.

Up to three launches, each parallel over entries: sums for the softmaxes, sums for the normalisations, and the result.
References: tests/kernels/references/postprocess.py.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from kvpolicy_kernels.common.compile_spec import Build
from kvpolicy_kernels.common.launch import Launch
from kvpolicy_kernels.common.meta_inputs import imagined
from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.support import require
from kvpolicy_kernels.common.traffic import Traffic
from kvpolicy_kernels.score.launch_config import check_column, check_output, check_segments
from kvpolicy_kernels.score.postprocess_kernel import finish_terms, normal_parts, softmax_parts
from kvpolicy_kernels.score.tile import Finish
from kvpolicy_kernels.score.window_queries import power_of_two

_BLOCK = 512  # entries of one program
_WARPS = 8
_MOST_SINKS = 4096
_MOST_PARTS = 8192
_WIDEST_POOL = 1023
_POOLS = ("none", "max", "average")
_NORMALS = ("none", "max", "standard")


@attrs.frozen
class _Step:
    """A `Finish` as kernels are told, a tuple of integers."""

    softmax: int  # place among the terms with a softmax, -1 = none
    pool: int
    size: int
    shared: bool
    normalise: int
    normal: int  # place among the terms that are normalised, -1 = none


def finish(
    segments: Segments,
    positions: Column,
    terms: Tensor,
    finishes: Sequence[Finish],
    *,
    sinks: int,
    recent: int,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum [P, T] float32 of the finished terms, -inf outside the candidates, and how many were NaN, [P] int32.

    `terms` are [terms, P, T] float32, one for each of `finishes`; a candidate whose sum is NaN becomes -inf.

    Raises:
        UnsupportedInputError: before anything is written, for what the kernels cannot do.
    """
    count, longest, device = segments.count, segments.longest, segments.starts.device
    steps = _check(segments, positions, terms, finishes, sinks, recent)
    if out is None:
        out = torch.empty(count, longest, dtype=torch.float32, device=device)
    check_output(out, "scores", (count, longest), torch.float32, device)
    nan = torch.empty(count, _parts(segments), dtype=torch.int32, device=device)
    for launch in _launches(segments, positions, terms, finishes, steps, (sinks, recent), (out, nan)):
        launch.run()
    return out, nan[:, 0] if nan.shape[1] == 1 else nan.sum(1, dtype=torch.int32)


def _parts(segments: Segments) -> int:
    return -(-segments.longest // _BLOCK)


def _launches(
    segments: Segments,
    positions: Column,
    terms: Tensor,
    finishes: Sequence[Finish],
    steps: Sequence[_Step],
    protect: tuple[int, int],
    results: tuple[Tensor, Tensor],
) -> Iterator[Launch]:
    parts = _parts(segments)
    grid = (segments.count, parts)
    softmaxes = sum(step.softmax >= 0 for step in steps)
    normals = sum(step.normal >= 0 for step in steps)
    sums = torch.empty(softmaxes + normals, segments.count, parts, 2, dtype=torch.float32, device=terms.device)
    constants = _constants(segments, steps, protect[0])
    sizes = {"T": segments.longest, "parts": parts}
    shared = {"TERMS": terms, "LENGTHS": segments.lengths, "SOFTMAX": sums if softmaxes else None, **sizes}
    if softmaxes:
        yield Launch(softmax_parts, grid, shared, {name: constants[name] for name in ("BLOCK", "STEPS")}, _WARPS)
    shared |= {"POSITIONS": positions.addresses, "STARTS": segments.starts, "sinks": protect[0], "recent": protect[1]}
    shared |= {"NORMAL": sums[softmaxes:] if normals else None}
    if normals:
        yield Launch(normal_parts, grid, shared, constants, _WARPS)
    weights = tuple(float(one.weight) for one in finishes)
    last = {"OUT": results[0], "NAN": results[1], "WEIGHTS": weights}
    yield Launch(finish_terms, grid, {**shared, **last}, constants, _WARPS)


def _check(
    segments: Segments, positions: Column, terms: Tensor, finishes: Sequence[Finish], sinks: int, recent: int
) -> tuple[_Step, ...]:
    """What the kernels are told of `finishes`. Raises UnsupportedInputError for what they cannot do."""
    check_segments(segments, sinks, recent)
    check_column({"positions": positions}, "positions", segments, (torch.int32,), 1)
    shape = (len(finishes), segments.count, segments.longest)
    require(len(finishes) > 0, "nothing to finish")
    check_output(terms, "terms", shape, torch.float32, segments.starts.device)
    require(sinks <= _MOST_SINKS, f"more than {_MOST_SINKS} sinks")
    require(segments.longest <= _MOST_PARTS * _BLOCK, f"more than {_MOST_PARTS * _BLOCK} entries")
    return _steps(finishes)


def _steps(finishes: Sequence[Finish]) -> tuple[_Step, ...]:
    softmaxes, normals, steps = 0, 0, []
    for one in finishes:
        require(one.pool in _POOLS and one.normalise in _NORMALS, f"an unknown finish: {one}")
        pools = one.pool != "none"
        require(not pools or (one.size % 2 == 1 and 0 < one.size <= _WIDEST_POOL), f"a pool of {one.size}")
        normal = _NORMALS.index(one.normalise)
        steps.append(
            _Step(
                softmaxes if one.softmax else -1,
                _POOLS.index(one.pool),
                one.size if pools else 1,
                one.shared,
                normal,
                normals if normal else -1,
            )
        )
        softmaxes, normals = softmaxes + one.softmax, normals + (normal > 0)
    return tuple(steps)


def _constants(segments: Segments, steps: Sequence[_Step], sinks: int) -> dict[str, Any]:
    return {
        "PER_LAYER": segments.per_layer,
        "HEADS": segments.heads,
        "SP": power_of_two(_parts(segments)),
        "SINKS": power_of_two(sinks) if sinks else 0,
        "BLOCK": _BLOCK,
        "STEPS": tuple(tuple(map(int, attrs.astuple(step))) for step in steps),
    }


def traffic(
    finishes: Sequence[Finish], lengths: Sequence[int], longest: int, *, heads: int, sinks: int, recent: int
) -> Traffic:
    """Bytes of one `finish` over heads that hold `lengths` entries each, all sinks among them."""
    steps = _steps(finishes)
    covered = -(-longest // _BLOCK) * _BLOCK
    softmaxes = sum(step.softmax >= 0 for step in steps) * sum(lengths)
    passes = [(step, 1 + (step.normal >= 0)) for step in steps]
    read = sum(
        times * (heads if step.shared else 1) * _loads(step, length, covered, sinks, recent)
        for step, times in passes
        for length in lengths
    )
    normals = any(step.normal >= 0 for step in steps)
    looks = 1 + normals + sum(times * (heads if step.shared else 1) for step, times in passes if step.pool)
    first = sum(min(sinks, length) for length in lengths) * -(-longest // _BLOCK)
    read_all = {"terms": 4 * (read + softmaxes), "positions": 4 * looks * first}
    return Traffic(read_all, {"scores": 4 * len(lengths) * longest}, 1 + (softmaxes > 0) + normals)


def _loads(step: _Step, length: int, covered: int, sinks: int, recent: int) -> int:
    """Scores of one head that one look at all slots of the programs loads."""
    if step.pool == 0:
        return length
    first, last = min(sinks, length), length - recent
    offsets = range(-(step.size // 2), step.size // 2 + 1)
    return sum(max(0, min(last - offset, covered) - max(first - offset, 0)) for offset in offsets)


def builds_for(name: str, finishes: Sequence[Finish], *, sinks: int = 4) -> Iterator[Build]:
    """The kernels that `finish` launches for these terms of one row of a model with 32 layers of 8 KV heads."""
    segments, columns = imagined(128, torch.bfloat16, 4)
    terms = torch.empty(len(finishes), segments.count, segments.longest, dtype=torch.float32, device="meta")
    results = terms[0], torch.empty(segments.count, _parts(segments), dtype=torch.int32, device="meta")
    launches = _launches(segments, columns["positions"], terms, finishes, _steps(finishes), (sinks, 32), results)
    for launch in launches:
        kind = launch.kernel.__name__.replace("_terms", "").replace("_", " ")
        yield launch.build(f"{kind} {name}", wide_loads=False)


def builds() -> Iterator[Build]:
    """Every step at once, and none."""
    rich = Finish(softmax=True, pool="max", size=7, shared=True, normalise="standard")
    yield from builds_for("of everything", (rich, Finish(pool="average", size=5, normalise="max")))
    yield from builds_for("of one term", (Finish(),), sinks=0)
