"""Scorers with a tile function: what the score kernel makes of it is what `score` gives."""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from kvpolicy.stages.checks import contract_error
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.samples import sample_view, scored, with_junk
from kvpolicy.stages.contracts import Plugin, Scorer
from kvpolicy.stages.view import View
from kvpolicy_kernels import Column, ColumnRequest, Segments, Tile, UnsupportedInputError
from kvpolicy_kernels.common.support import interpreting

# How far a score of a kernel may be from that of the reference: a part of how far apart the scores of the candidates
# are, and a part of the largest magnitude among them. In bfloat16 a reference may round every product.
_ROUNDING = {torch.float32: (1e-4, 1e-6), torch.bfloat16: (2e-2, 2**-8)}
_LITTLE = ((14, 9), (5, 0))  # entries per row and head: a few, and none
_LONG = ((131, 66),)  # more than a kernel looks at in one tile
_OLDER = 3  # queries that another scorer may have asked for, older than those that this one needs


def cases(plugin: Plugin) -> list[tuple[str, Callable[[Scorer, Promises], None]]]:
    """Name and check of what a tile function must keep; where none can run, the name says why nothing is compared."""
    if not isinstance(plugin, Scorer) or type(plugin).tile is Scorer.tile:
        return []
    against = _obstacle()
    if against:
        return [(f"tile is not compared with score: {against}", _not_compared)]
    return [("tile gives what score gives", gives_what_score_gives)]


def offers_a_tile_or_a_reason(scorer: Scorer, _promises: Promises) -> None:
    """Without Triton, the import of a tile function may fail: a plan then runs the reference."""
    try:
        found: object = scorer.tile()
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return
        raise
    if not isinstance(found, (Tile, str)) or found == "":
        raise contract_error(scorer, f"offered {found!r} as its tile, expected a Tile or why there is none")


def gives_what_score_gives(scorer: Scorer, _promises: Promises) -> None:
    tile = scorer.tile()
    if isinstance(tile, str):
        return
    for when, view in _situations(scorer):
        try:
            found, wrong = _by_kernels(tile, view)
        except UnsupportedInputError as error:
            raise contract_error(scorer, f"offered a tile that kernels refuse: {error}") from error
        if wrong:
            raise contract_error(scorer, f"gave {wrong} scores that are NaN by its tile {when}")
        _expect_equal(scorer, view, found, scored(scorer, view), when)


def _not_compared(_scorer: Scorer, _promises: Promises) -> None:
    """The name of the case says it all."""


def _obstacle() -> str:
    """Why no kernel runs in this process; empty where one does. Decided when Triton is imported."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not interpreting():
        return "" if torch.cuda.is_available() else "no GPU, and TRITON_INTERPRET=1 is not set"
    from triton.runtime.jit import JITFunction

    from kvpolicy_kernels.score.score_kernel import score

    return "TRITON_INTERPRET=1 was set after Triton was imported" if isinstance(score, JITFunction) else ""


def _situations(scorer: Scorer) -> Iterator[tuple[str, View]]:
    """Few views, for interpreters are slow, that tell tile and score apart; each with what is special about it."""
    device = torch.device("cpu" if interpreting() else "cuda")
    yield "for heads alike, padded and ragged", _on(device, _with_state(sample_view(scorer)))
    view = with_junk(_with_state(sample_view(scorer, lengths=_LITTLE)))
    queries = None if view.queries is None else view.queries.bfloat16()
    rounded = attrs.evolve(view, keys=view.keys.bfloat16(), values=view.values.bfloat16(), queries=queries)
    yield "in bfloat16, with numbers in empty slots", _on(device, rounded)
    yield "for more entries than a tile, some evicted, with votes and older queries", _on(device, _long(scorer))


def _long(scorer: Scorer) -> View:
    """Heads of several tiles, as a policy with other plugins shows them in its second layer."""
    random = torch.Generator().manual_seed(4)
    view = with_junk(_with_state(sample_view(scorer, lengths=_LONG)))
    votes = torch.rand(view.positions.shape, generator=random, dtype=torch.float32)
    positions = view.positions.where(view.positions < 0, 2 * view.positions)  # between two held ones, one is gone
    queries = view.queries
    if queries is not None:
        shape = (*queries.shape[:2], _OLDER, queries.shape[3])
        queries = torch.cat([torch.randn(shape, generator=random, dtype=torch.float32), queries], 2)
    return attrs.evolve(view, layer=1, positions=positions, log_votes=votes, queries=queries)


def _with_state(view: View) -> View:
    """With numbers in the slot state: no tile function sees any, so no score may depend on it."""
    random = torch.Generator().manual_seed(5)
    states = {name: torch.rand(one.shape, generator=random, dtype=one.dtype) for name, one in view.slot_state.items()}
    return attrs.evolve(view, slot_state=states)


def _on(device: torch.device, view: View) -> View:
    """The view with its tensors on a device."""
    fields = {field.name: getattr(view, field.name) for field in attrs.fields(View) if field.init}
    moved: dict[str, Any] = {name: one.to(device) for name, one in fields.items() if isinstance(one, Tensor)}
    moved["slot_state"] = {name: one.to(device) for name, one in view.slot_state.items()}
    return attrs.evolve(view, **moved)


def _by_kernels(tile: Tile, view: View) -> tuple[Tensor, int]:
    """Scores [B, K, T] float32 as a plan with this tile computes them, without weight and scale; how many are NaN.

    Raises UnsupportedInputError for a tile that kernels cannot run.
    """
    from kvpolicy_kernels.score.postprocess import postprocess
    from kvpolicy_kernels.score.score import scores
    from kvpolicy_kernels.score.window_queries import WindowQueries

    held = {"keys": view.keys, "values": view.values, "positions": view.positions.to(torch.int32)}
    if view.log_votes is not None:
        held["log_votes"] = view.log_votes
    if view.attention is not None:
        held["attention"] = view.attention.transpose(-1, -2)
    columns = {name: Column.of([one.contiguous()]) for name, one in held.items()}
    segments = Segments.of([view.keys.contiguous()], view.lengths[None])
    request = ColumnRequest(segments, columns["keys"], columns["values"], columns["positions"])
    last = attrs.evolve(tile.postprocess, normalise="none", weight=1.0)  # a policy says these two
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


def _expect_equal(scorer: Scorer, view: View, found: Tensor, expected: Tensor, when: str) -> None:
    """Refuses a difference among candidates that rounding does not explain."""
    wanted = expected[view.candidates]
    apart, size = _ROUNDING[view.keys.dtype]
    allowed = float(apart * (wanted.amax() - wanted.amin()) + size * wanted.abs().amax())
    difference = (found - expected).abs().nan_to_num(torch.inf).masked_fill(~view.candidates, 0.0)
    worst = difference.amax()
    if worst <= allowed < torch.inf:
        return
    row, head, slot = (difference == worst).nonzero()[0].tolist()
    scores = f"{float(found[row, head, slot]):.6g} by its tile, {float(expected[row, head, slot]):.6g} by `score`"
    where = f"row {row}, head {head}, slot {slot}"
    raise contract_error(scorer, f"gives {scores} {when} ({where}), expected a difference of at most {allowed:.2g}")


CHECKS = (offers_a_tile_or_a_reason,)
