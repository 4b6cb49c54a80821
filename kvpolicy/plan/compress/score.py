"""Scores: the weighted sum of a policy's scorers over the entries of one layer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kvpolicy.plan.forward_observers import state_name
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.stages import Scorer, View
from kvpolicy.stages.checking.declared import slot_state_of
from kvpolicy.stages.checking.returned import check_scores, check_state
from kvpolicy.stages.checking.untouched import tensors_of, watching
from kvpolicy.stages.standardise import standardised


def weighted_sum(spec: PolicySpec, view: View) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum [B, K, T] float32 over the scorers, and their new slot state, named as in the store.

    Outside the candidates it is any number, and NaN where scorers give it.
    """
    total = torch.zeros(view.positions.shape, dtype=torch.float32, device=view.keys.device)
    observed: dict[str, Tensor] = {}
    for term, weighted in enumerate(spec.score):
        scores, fresh = scored(weighted.scorer, state_name(term, ""), view)
        observed.update(fresh)
        total = total + weighted.weight * _normalised(scores, view, weighted.normalise)
    return total, observed


def scored(scorer: Scorer, prefix: str, view: View) -> tuple[Tensor, dict[str, Tensor]]:
    """The scores [B, K, T] of one scorer, and its new slot state, whose names begin with `prefix` in the store."""
    own, calibration = state_of(view, prefix), calibration_of(view, prefix)
    seen = view.with_state(own, calibration=calibration)
    fresh: Mapping[str, Tensor] = {}
    if own:
        with watching(scorer, lambda: tensors_of(seen)):
            fresh = scorer.observe(seen)
        check_state(scorer, fresh, own)
    if fresh:
        seen = seen.with_state({**own, **fresh}, calibration=calibration)
    with watching(scorer, lambda: tensors_of(seen)):
        scores = scorer.score(seen)
    check_scores(scorer, scores, view)
    return scores, {prefix + name: _remembered(scorer, name, values) for name, values in fresh.items()}


def state_of(view: View, prefix: str) -> dict[str, Tensor]:
    """The slot state of one plugin, by its own names."""
    return {name.removeprefix(prefix): t for name, t in view.slot_state.items() if name.startswith(prefix)}


def calibration_of(view: View, prefix: str) -> dict[str, Tensor]:
    """What one plugin was calibrated with, by its own names."""
    return {name.removeprefix(prefix): t for name, t in view.calibration.items() if name.startswith(prefix)}


def _remembered(scorer: Scorer, name: str, values: Tensor) -> Tensor:
    """State to be carried on: NaN is told by this step's scores, and forgotten, or it would stay for good."""
    fill = next((state.fill for state in slot_state_of(scorer) if state.name == name), 0.0)
    return values.masked_fill(values.isnan(), fill)


def _normalised(scores: Tensor, view: View, how: str) -> Tensor:
    if how == "none":
        return scores
    if how == "standard":
        return standardised(scores, view.candidates)
    inside = scores.masked_fill(~view.candidates, 0)
    magnitude = inside.abs().masked_fill(~inside.isfinite(), 0).amax(-1, keepdim=True)
    return scores / magnitude.clamp(min=torch.finfo(torch.float32).tiny)
