"""Checks for selectors: they choose as many candidates as asked, and the best ones where they say so."""

from typing import Any

import attrs
import torch

from kvpolicy.stages.checking.returned import check_second_scores, check_tensor, contract_error
from kvpolicy.stages.checking.untouched import tensors_of, untouched
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.samples import sample_view
from kvpolicy.stages.contracts import Selector
from kvpolicy.stages.selection_request import SelectionRequest


def chooses_as_many_as_asked(selector: Selector, _promises: Promises) -> None:
    for request in _samples(selector):
        chosen = selector.select(request)
        sizes = dict(zip(("batch", "kv_heads", "seq"), request.scores.shape, strict=True))
        check_tensor(selector, chosen, sizes, torch.bool, request.scores.device)
        if (chosen & ~request.candidates).any():
            raise contract_error(selector, "chose slots that are not candidates")
        counts = request.counts
        if not torch.equal(chosen.sum(-1), counts):
            raise contract_error(selector, f"chose {chosen.sum(-1).tolist()} entries, expected {counts.tolist()}")


def chooses_the_best(selector: Selector, _promises: Promises) -> None:
    """No candidate that is not chosen scores higher than a chosen one; NaN is less than any number."""
    for request in _samples(selector) if selector.best else ():
        chosen = selector.select(request)
        worth = request.scores.double().nan_to_num(nan=-torch.inf, posinf=1e300, neginf=-1e300)
        worst_chosen = worth.masked_fill(~chosen, torch.inf).amin(-1)
        best_left = worth.masked_fill(chosen | ~request.candidates, -torch.inf).amax(-1)
        if (best_left > worst_chosen).any():
            raise contract_error(selector, "left a candidate that scores higher than one it chose")


def takes_nan_last(selector: Selector, _promises: Promises) -> None:
    """A candidate whose score is NaN stays only where all others do."""
    for request in _samples(selector):
        chosen, wrong = selector.select(request), request.scores.isnan() & request.candidates
        others_left = (request.candidates & ~wrong & ~chosen).any(-1)
        if ((chosen & wrong).any(-1) & others_left).any():
            raise contract_error(selector, "chose a candidate whose score is NaN, and left one whose score is a number")


def breaks_ties_by_age(selector: Selector, _promises: Promises) -> None:
    if not selector.best:
        return
    request = _samples(selector)[0]
    candidates = request.candidates
    for scores in (
        torch.zeros(candidates.shape, dtype=torch.float32),
        torch.zeros(candidates.shape, dtype=torch.float32).neg(),
    ):
        scores[..., ::2] = 0.0  # -0.0 equals 0.0
        chosen = selector.select(attrs.evolve(request, scores=scores))
        first = candidates & (candidates.cumsum(-1) <= request.counts[..., None])
        if not torch.equal(chosen, first):
            raise contract_error(selector, "chose later entries among equal scores, expected the earlier ones")


def keeps_rows_apart(selector: Selector, _promises: Promises) -> None:
    for request in _samples(selector):
        together = selector.select(request)
        for row in range(len(request.counts)):
            if not torch.equal(selector.select(_row(request, row)), together[row : row + 1]):
                raise contract_error(selector, f"chose other entries for row {row} alone")


def looks_at_no_layer(selector: Selector, _promises: Promises) -> None:
    for request in _samples(selector) if selector.layers_as_rows else ():
        other = attrs.evolve(request, layer=request.layer + 1)
        if not torch.equal(selector.select(other), selector.select(request)):
            raise contract_error(selector, "chose other entries for another layer")


def leaves_its_input_alone(selector: Selector, _promises: Promises) -> None:
    view = sample_view(selector)
    with untouched(selector, tensors_of(view)):
        selector.second_scores(view)
    for request in _samples(selector):
        with untouched(selector, request.tensors()):
            selector.select(request)


def gives_second_scores_for_every_slot(selector: Selector, _promises: Promises) -> None:
    view = sample_view(selector)
    scores = selector.second_scores(view)
    if scores is not None:
        check_second_scores(selector, scores, view)


def _row(request: SelectionRequest, row: int) -> SelectionRequest:
    own: dict[str, Any] = {name: tensor[row : row + 1] for name, tensor in request.tensors().items()}
    return attrs.evolve(request, **own)


def _samples(selector: Selector) -> list[SelectionRequest]:
    """Scores with and without ties, infinities and NaN; counts from none to all; with regions and without."""
    view = sample_view(selector)
    room = view.candidates.sum(-1)
    finite = view.keys.square().sum(-1)
    non_finite = finite.clone()
    non_finite[..., 2::5], non_finite[..., 3::5], non_finite[..., 4::7] = torch.inf, -torch.inf, torch.nan
    regions = (view.positions // 7 % 3).clamp(min=0).to(torch.int8)
    return [
        SelectionRequest.of(attrs.evolve(view, regions=label), scores, counts, selector.second_scores(view))
        for scores in (finite, finite.round(), non_finite, torch.full_like(finite, torch.nan))
        for counts in (room // 2, torch.zeros_like(room), room, room.clamp(max=1))
        for label in (None, regions)
    ]


CHECKS = (
    gives_second_scores_for_every_slot,
    chooses_as_many_as_asked,
    chooses_the_best,
    takes_nan_last,
    breaks_ties_by_age,
    keeps_rows_apart,
    looks_at_no_layer,
    leaves_its_input_alone,
)
