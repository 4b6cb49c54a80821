"""Checks for scorers with a tile function: the score kernel gives the scores of `score`."""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from kvpolicy.stages.checking.returned import contract_error
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.samples import sample_view, scored, with_junk
from kvpolicy.stages.contracts import Plugin, Scorer
from kvpolicy.stages.view import View
from kvpolicy_kernels import Column, ColumnRequest, Segments, Tile, UnsupportedInputError
from kvpolicy_kernels.common.support import interpreting

# Tolerances of kernel scores: relative to the range of the candidates' scores, and to their largest magnitude.
# In bfloat16 the reference may round every product.
_ROUNDING = {torch.float32: (1e-4, 1e-6), torch.bfloat16: (2e-2, 2**-8)}
_SHORT_LENGTHS = ((14, 9), (5, 0))  # entries per row and head: few, or none
_LONG_LENGTHS = ((131, 66),)  # longer than one tile of a kernel
_OLDER_QUERIES = 3  # queries before those that the scorer needs, as if observed for another scorer


def cases(plugin: Plugin) -> list[tuple[str, Callable[[Scorer, Promises], None]]]:
    """Names and checks of a tile function; if no kernel can run, the name has the reason why nothing is compared."""
    if not isinstance(plugin, Scorer) or type(plugin).tile is Scorer.tile:
        return []
    obstacle = _obstacle()
    if obstacle:
        return [(f"tile is not compared with score: {obstacle}", _not_compared)]
    return [("tile gives what score gives", gives_what_score_gives)]


def offers_a_tile_or_a_reason(scorer: Scorer, _promises: Promises) -> None:
    """Importing a tile function may fail without Triton: a plan then runs the reference."""
    try:
        tile: object = scorer.tile()
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return
        raise
    if not isinstance(tile, (Tile, str)) or tile == "":
        raise contract_error(scorer, f"offered {tile!r} as its tile, expected a Tile or why there is none")


def gives_what_score_gives(scorer: Scorer, _promises: Promises) -> None:
    tile = scorer.tile()
    if isinstance(tile, str):
        return
    for situation, view in _situations(scorer):
        try:
            scores, nan_count = _by_kernels(tile, view)
        except UnsupportedInputError as error:
            raise contract_error(scorer, f"offered a tile that kernels refuse: {error}") from error
        if nan_count:
            raise contract_error(scorer, f"gave {nan_count} scores that are NaN by its tile {situation}")
        _expect_equal(scorer, view, scores, scored(scorer, view), situation)


def _not_compared(_scorer: Scorer, _promises: Promises) -> None:
    """The name of the case has the reason."""


def _obstacle() -> str:
    """Why kernels cannot run in this process; empty if they can. Fixed when Triton is imported."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not interpreting():
        return "" if torch.cuda.is_available() else "no GPU, and TRITON_INTERPRET=1 is not set"
    from triton.runtime.jit import JITFunction

    from kvpolicy_kernels.score.score_kernel import score

    return "TRITON_INTERPRET=1 was set after Triton was imported" if isinstance(score, JITFunction) else ""


def _situations(scorer: Scorer) -> Iterator[tuple[str, View]]:
    """Descriptions and views in which a wrong tile differs from `score`; few, as the interpreter is slow."""
    device = torch.device("cpu" if interpreting() else "cuda")
    yield "for equal, padded and ragged heads", _on(device, _with_state(sample_view(scorer)))
    view = with_junk(_with_state(sample_view(scorer, lengths=_SHORT_LENGTHS)))
    queries = None if view.queries is None else view.queries.bfloat16()
    rounded = attrs.evolve(view, keys=view.keys.bfloat16(), values=view.values.bfloat16(), queries=queries)
    yield "in bfloat16, with numbers in empty slots", _on(device, rounded)
    yield "for more entries than a tile, some evicted, with votes and older queries", _on(device, _long(scorer))


def _long(scorer: Scorer) -> View:
    """Heads of several tiles in the second layer, with votes and queries of other plugins."""
    random = torch.Generator().manual_seed(4)
    view = with_junk(_with_state(sample_view(scorer, lengths=_LONG_LENGTHS)))
    votes = torch.rand(view.positions.shape, generator=random, dtype=torch.float32)
    positions = view.positions.where(view.positions < 0, 2 * view.positions)  # every second entry is evicted
    queries = view.queries
    if queries is not None:
        shape = (*queries.shape[:2], _OLDER_QUERIES, queries.shape[3])
        queries = torch.cat([torch.randn(shape, generator=random, dtype=torch.float32), queries], 2)
    return attrs.evolve(view, layer=1, positions=positions, log_votes=votes, queries=queries)


def _with_state(view: View) -> View:
    """The view with random slot state. Tile functions do not see it, so scores must not depend on it."""
    random = torch.Generator().manual_seed(5)
    states = {
        name: torch.rand(state.shape, generator=random, dtype=state.dtype) for name, state in view.slot_state.items()
    }
    return attrs.evolve(view, slot_state=states)


def _on(device: torch.device, view: View) -> View:
    """The view with its tensors on a device."""
    fields = {field.name: getattr(view, field.name) for field in attrs.fields(View) if field.init}
    moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in fields.items() if isinstance(tensor, Tensor)}
    moved["slot_state"] = {name: tensor.to(device) for name, tensor in view.slot_state.items()}
    return attrs.evolve(view, **moved)


def _by_kernels(tile: Tile, view: View) -> tuple[Tensor, int]:
    """Scores [B, K, T] float32 as a plan computes them, without weight and normalisation; and how many are NaN.

    Raises UnsupportedInputError for a tile that kernels cannot run.
    """
    from kvpolicy_kernels.score.postprocess import postprocess
    from kvpolicy_kernels.score.score import scores
    from kvpolicy_kernels.score.window_queries import WindowQueries

    tensors = {"keys": view.keys, "values": view.values, "positions": view.positions.to(torch.int32)}
    if view.log_votes is not None:
        tensors["log_votes"] = view.log_votes
    if view.attention is not None:
        tensors["attention"] = view.attention.transpose(-1, -2)
    columns = {name: Column.of([tensor.contiguous()]) for name, tensor in tensors.items()}
    segments = Segments.of([view.keys.contiguous()], view.lengths[None])
    request = ColumnRequest(segments, columns["keys"], columns["values"], columns["positions"])
    last = attrs.evolve(tile.postprocess, normalise="none", weight=1.0)  # both are set by policies, not by plugins
    with warnings.catch_warnings():
        if interpreting():  # NumPy reports overflows in slots that are masked
            warnings.simplefilter("ignore", RuntimeWarning)
        extra = None if tile.column is None else tile.column(request)
        window = None
        if tile.window is not None:
            window = WindowQueries.of([view.window], [view.window_positions], segments, view.scaling)
        raw = scores(segments, columns, window, [tile], [extra], sinks=view.sinks, recent=view.recent)
        total, nan = postprocess(segments, columns["positions"], raw, [last], sinks=view.sinks, recent=view.recent)
    return total.view(view.positions.shape), int(nan.sum())


def _expect_equal(scorer: Scorer, view: View, actual: Tensor, expected: Tensor, situation: str) -> None:
    """Raise PluginContractError for differences among candidates beyond rounding."""
    candidate_scores = expected[view.candidates]
    relative_to_range, relative_to_magnitude = _ROUNDING[view.keys.dtype]
    allowed = float(
        relative_to_range * (candidate_scores.amax() - candidate_scores.amin())
        + relative_to_magnitude * candidate_scores.abs().amax()
    )
    difference = (actual - expected).abs().nan_to_num(torch.inf).masked_fill(~view.candidates, 0.0)
    worst = difference.amax()
    if worst <= allowed < torch.inf:
        return
    row, head, slot = (difference == worst).nonzero()[0].tolist()
    scores = f"{float(actual[row, head, slot]):.6g} by its tile, {float(expected[row, head, slot]):.6g} by `score`"
    where = f"row {row}, head {head}, slot {slot}"
    raise contract_error(
        scorer, f"gives {scores} {situation} ({where}), expected a difference of at most {allowed:.2g}"
    )


CHECKS = (offers_a_tile_or_a_reason,)
