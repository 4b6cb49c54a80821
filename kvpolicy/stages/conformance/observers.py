"""Scorers and mergers: what they declare makes sense, and they follow forwards as they say."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from kvpolicy.stages.checking.declared import needs_of, reads_prompts, row_state_of, slot_state_of
from kvpolicy.stages.checking.returned import check_tensor, contract_error, seen_shape
from kvpolicy.stages.checking.untouched import tensors_of_query_logits, untouched
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.samples import query_logits_of, sample_view
from kvpolicy.stages.contracts import Merger, Observer, Scorer, State


def declares_what_makes_sense(observer: Observer, _promises: Promises) -> None:
    needs_of(observer)
    slot_state_of(observer)
    if isinstance(observer, Scorer):
        reads_prompts(observer)
    if isinstance(observer, Merger):
        row_state_of(observer)


def observes_forwards_as_declared(observer: Observer, _promises: Promises) -> None:
    if not needs_of(observer).forward_queries:
        return
    view = sample_view(observer)
    query_logits = query_logits_of(observer, view)
    with untouched(observer, tensors_of_query_logits(query_logits, view.slot_state)):
        fresh = observer.observe_forward(query_logits, view.slot_state)
    expect_declared(observer, "observed a forward and returned", fresh, observer.slot_state())
    for name, state in fresh.items():
        check_tensor(observer, state, seen_shape(view), torch.float32, view.keys.device)
        if state[view.valid].isnan().any():
            raise contract_error(observer, f"observed a forward and returned NaN in {name!r}")


def expect_declared(observer: Observer, did: str, found: Mapping[str, Tensor], states: Iterable[State]) -> None:
    """Refuses state that was not declared."""
    declared = {state.name for state in states}
    if not found.keys() <= declared:
        raise contract_error(observer, f"{did} {sorted(found)}, expected only {sorted(declared)}")


CHECKS = (declares_what_makes_sense, observes_forwards_as_declared)
