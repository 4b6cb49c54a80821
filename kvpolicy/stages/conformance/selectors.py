"""Checks for selectors: they choose the requested number of candidates, the best ones."""

import torch
from torch import Tensor

from kvpolicy.stages.checking.returned import check_tensor, contract_error
from kvpolicy.stages.checking.untouched import untouched
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.samples import sample_view
from kvpolicy.stages.contracts import Selector


def chooses_as_many_as_asked(selector: Selector, _promises: Promises) -> None:
    for scores, candidates, counts in _samples():
        chosen = selector.select(scores, candidates, counts)
        sizes = dict(zip(("batch", "kv_heads", "seq"), scores.shape, strict=True))
        check_tensor(selector, chosen, sizes, torch.bool, scores.device)
        if (chosen & ~candidates).any():
            raise contract_error(selector, "chose slots that are not candidates")
        if not torch.equal(chosen.sum(-1), counts):
            raise contract_error(selector, f"chose {chosen.sum(-1).tolist()} entries, expected {counts.tolist()}")


def chooses_the_best(selector: Selector, _promises: Promises) -> None:
    """No candidate that is not chosen scores higher than a chosen one; NaN is less than any number."""
    for scores, candidates, counts in _samples():
        chosen = selector.select(scores, candidates, counts)
        worth = scores.double().nan_to_num(nan=-torch.inf, posinf=1e300, neginf=-1e300)
        worst_chosen = worth.masked_fill(~chosen, torch.inf).amin(-1)
        best_left = worth.masked_fill(chosen | ~candidates, -torch.inf).amax(-1)
        if (best_left > worst_chosen).any():
            raise contract_error(selector, "left a candidate that scores higher than one it chose")


def breaks_ties_by_age(selector: Selector, _promises: Promises) -> None:
    _, candidates, counts = _samples()[0]
    for scores in (
        torch.zeros(candidates.shape, dtype=torch.float32),
        torch.zeros(candidates.shape, dtype=torch.float32).neg(),
    ):
        scores[..., ::2] = 0.0  # -0.0 equals 0.0
        chosen = selector.select(scores, candidates, counts)
        first = candidates & (candidates.cumsum(-1) <= counts[..., None])
        if not torch.equal(chosen, first):
            raise contract_error(selector, "chose later entries among equal scores, expected the earlier ones")


def keeps_rows_apart(selector: Selector, _promises: Promises) -> None:
    for scores, candidates, counts in _samples():
        together = selector.select(scores, candidates, counts)
        for row in range(len(counts)):
            index = slice(row, row + 1)
            if not torch.equal(selector.select(scores[index], candidates[index], counts[index]), together[index]):
                raise contract_error(selector, f"chose other entries for row {row} alone")


def leaves_its_input_alone(selector: Selector, _promises: Promises) -> None:
    for scores, candidates, counts in _samples():
        inputs = {"scores": scores, "candidates": candidates, "counts": counts}
        with untouched(selector, inputs):
            selector.select(scores, candidates, counts)


def _samples() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Scores with and without ties, infinities and NaN; counts from none to all."""
    view = sample_view()
    room = view.candidates.sum(-1)
    finite = view.keys.square().sum(-1)
    non_finite = finite.clone()
    non_finite[..., 2::5], non_finite[..., 3::5], non_finite[..., 4::7] = torch.inf, -torch.inf, torch.nan
    return [
        (scores, view.candidates, counts)
        for scores in (finite, finite.round(), non_finite, torch.full_like(finite, torch.nan))
        for counts in (room // 2, torch.zeros_like(room), room, room.clamp(max=1))
    ]


CHECKS = (
    chooses_as_many_as_asked,
    chooses_the_best,
    breaks_ties_by_age,
    keeps_rows_apart,
    leaves_its_input_alone,
)
