"""Scorers and mergers: what they declare makes sense, and they follow forwards as they say."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from kvpolicy.stages.checks import check_tensor, contract_error, seen_shape
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.samples import glimpse_of, sample_view
from kvpolicy.stages.contracts import Merger, Observer, State
from kvpolicy.stages.declared import needs_of, row_state_of, slot_state_of
from kvpolicy.stages.untouched import tensors_of_glimpse, untouched


def declares_what_makes_sense(observer: Observer, _promises: Promises) -> None:
    needs_of(observer)
    slot_state_of(observer)
    if isinstance(observer, Merger):
        row_state_of(observer)


def follows_what_it_declared(observer: Observer, _promises: Promises) -> None:
    if not needs_of(observer).followed:
        return
    view = sample_view(observer)
    glimpse = glimpse_of(observer, view)
    with untouched(observer, tensors_of_glimpse(glimpse, view.slot_state)):
        followed = observer.follow(glimpse, view.slot_state)
    expect_declared(observer, "followed", followed, observer.slot_state())
    for name, state in followed.items():
        check_tensor(observer, state, seen_shape(view), torch.float32, view.keys.device)
        if state[view.valid].isnan().any():
            raise contract_error(observer, f"followed with NaN in {name!r}")


def expect_declared(observer: Observer, did: str, found: Mapping[str, Tensor], states: Iterable[State]) -> None:
    """Refuses state that was not declared."""
    declared = {one.name for one in states}
    if not found.keys() <= declared:
        raise contract_error(observer, f"{did} {sorted(found)}, expected only {sorted(declared)}")


CHECKS = (declares_what_makes_sense, follows_what_it_declared)
