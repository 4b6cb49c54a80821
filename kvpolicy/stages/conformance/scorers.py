"""Scorers: right shape, no side effects, rows and heads apart, empty slots without influence."""

import attrs
import torch
from torch import Tensor

from kvpolicy.stages.checking.returned import check_scores, check_tensor, contract_error, seen_shape
from kvpolicy.stages.checking.untouched import tensors_of, untouched
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.samples import (
    expect_close,
    heads_swapped,
    of_another_layer,
    rows_of,
    sample_view,
    scored,
    shuffled,
    with_junk,
)
from kvpolicy.stages.contracts import Scorer
from kvpolicy.stages.view import View


def returns_float32_per_slot(scorer: Scorer, _promises: Promises) -> None:
    view = sample_view(scorer)
    check_scores(scorer, scored(scorer, view), view)
    halves = attrs.evolve(view, keys=view.keys.bfloat16(), values=view.values.bfloat16())
    check_scores(scorer, scored(scorer, halves), halves)


def observes_what_it_declared(scorer: Scorer, _promises: Promises) -> None:
    view = sample_view(scorer)
    declared = {state.name for state in scorer.slot_state()}
    observed = scorer.observe(view)
    if not observed.keys() <= declared:
        raise contract_error(scorer, f"observed {sorted(observed)}, expected only {sorted(declared)}")
    for state in observed.values():
        check_tensor(scorer, state, seen_shape(view), torch.float32, view.keys.device)


def gives_finite_scores(scorer: Scorer, _promises: Promises) -> None:
    view = sample_view(scorer)
    alike = attrs.evolve(view, keys=torch.ones_like(view.keys), values=torch.ones_like(view.values))
    zero = attrs.evolve(view, keys=torch.zeros_like(view.keys), values=torch.zeros_like(view.values))
    single = attrs.evolve(sample_view(scorer, lengths=((1, 1),)), sinks=0, recent=0)
    for name, shown in {
        "ordinary keys": view,
        "equal keys": alike,
        "zero keys": zero,
        "shown entry": single,
    }.items():
        wrong = ~scored(scorer, shown)[shown.candidates].isfinite()
        if wrong.any():
            raise contract_error(scorer, f"gave {int(wrong.sum())} scores that are not finite for {name}")


def leaves_its_input_alone(scorer: Scorer, _promises: Promises) -> None:
    view = sample_view(scorer)
    with untouched(scorer, tensors_of(view)):
        fresh = scorer.observe(view)
    # what the view has computed is shared by all scorers
    seen = view.with_state({**view.slot_state, **fresh}, calibration=view.calibration)
    with untouched(scorer, tensors_of(seen)):
        scorer.score(seen)


def is_deterministic(scorer: Scorer, _promises: Promises) -> None:
    first, again = (scored(scorer, sample_view(scorer)) for _ in range(2))
    if not torch.equal(first, again):
        raise contract_error(scorer, "gave other scores the second time")


def keeps_rows_apart(scorer: Scorer, _promises: Promises) -> None:
    view = sample_view(scorer)
    together = scored(scorer, view)
    batch = together.shape[0]
    for rows in [list(reversed(range(batch))), *([row] for row in range(batch))]:
        part = rows_of(view, rows)
        alone = scored(scorer, part)
        _expect_same(scorer, part, alone, together[rows][..., : alone.shape[-1]], f"for the rows {rows}")


def keeps_heads_apart(scorer: Scorer, promises: Promises) -> None:
    if not promises.heads_apart:
        return
    view = sample_view(scorer)
    swapped = heads_swapped(view)
    _expect_same(scorer, swapped, scored(scorer, swapped), scored(scorer, view).flip(1), "for heads swapped")


def ignores_empty_slots(scorer: Scorer, _promises: Promises) -> None:
    view = sample_view(scorer)
    junk = with_junk(view)
    _expect_same(scorer, view, scored(scorer, junk), scored(scorer, view), "with other empty slots")


def copes_with_nothing_to_score(scorer: Scorer, _promises: Promises) -> None:
    view = sample_view(scorer, lengths=((9, 9), (0, 0), (2, 0)))
    scores = scored(scorer, view)
    check_scores(scorer, scores, view)
    if not scores[view.candidates].isfinite().all():
        raise contract_error(scorer, "gave scores that are not finite beside rows that hold nothing")


def scores_the_same_in_any_order(scorer: Scorer, _promises: Promises) -> None:
    if not scorer.in_any_order():
        return
    view = sample_view(scorer)
    other, slots = shuffled(view)
    _expect_same(scorer, other, scored(scorer, other), scored(scorer, view).gather(-1, slots), "in another order")


def _expect_same(scorer: Scorer, view: View, scores: Tensor, expected: Tensor, when: str) -> None:
    expect_close(scorer, scores[view.candidates], expected[view.candidates], when)


def looks_at_no_layer(scorer: Scorer, _promises: Promises) -> None:
    if not scorer.layers_as_rows:
        return
    view = sample_view(scorer)
    other = of_another_layer(view)
    _expect_same(scorer, other, scored(scorer, other), scored(scorer, view), "for another layer")


CHECKS = (
    returns_float32_per_slot,
    observes_what_it_declared,
    gives_finite_scores,
    leaves_its_input_alone,
    is_deterministic,
    keeps_rows_apart,
    keeps_heads_apart,
    ignores_empty_slots,
    copes_with_nothing_to_score,
    scores_the_same_in_any_order,
    looks_at_no_layer,
)
