"""Scorer `history`: combines scores of another scorer over time."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import (
    Choice,
    Geometry,
    Needs,
    Nested,
    Number,
    Pass,
    Plugged,
    Prompt,
    QueryLogits,
    Sample,
    Scorer,
    Site,
    State,
    View,
    parameter,
)
from kvpolicy_plugins.scorers.shared.pooling import Pool

_STATE = "history"
_NO_HISTORY = -torch.inf


@attrs.frozen
class History(Scorer):
    """Scores F of another scorer, combined with the previous scores of each entry: the global score of G-KV.

    1. `scale: max` divides F by its largest magnitude among a head's candidates;
    2. with the old score O of an entry, F' is max(decay·O, F), or decay·O + (1 - decay)·F for `mean`, or
       decay·O + F for `sum`; an entry that was not a candidate before has no old score, and F' = F;
    3. F' is stored for the next time; the score is F' after pooling.
    """

    name: ClassVar[str] = "history"
    reference: ClassVar[str] = "arXiv:2512.00504"

    of: Scorer = parameter(Plugged("score"), help="the scorer whose scores are combined")
    update: str = parameter(Choice(("max", "mean", "sum")), "max", help="how old and new scores are combined")
    decay: float = parameter(Number(minimum=0, maximum=1), 0.8, help="factor on the old score (alpha)")
    scale: str = parameter(
        Choice(("none", "max")), "max", help="divide new scores by their maximum before they are combined"
    )
    pool: Pool = parameter(Nested(Pool), Pool(), help="smoothing over neighbouring candidates, not stored")

    def __attrs_post_init__(self) -> None:
        if any(state.name == _STATE for state in self.of.slot_state()):
            raise ParameterError(f"of: must be a scorer without a history: {self.of}")

    def needs(self) -> Needs:
        return self.of.needs()

    def slot_state(self) -> tuple[State, ...]:
        return (*self.of.slot_state(), State(_STATE, fill=_NO_HISTORY))

    def in_any_order(self) -> bool:
        return self.of.in_any_order()

    @property
    def calibrated(self) -> bool:
        return self.of.calibrated

    def calibrate(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        return self.of.calibrate(samples)

    def calibration_of(self, table: Tensor, geometry: Geometry) -> list[dict[str, Tensor]]:
        return self.of.calibration_of(table, geometry)

    def check_calibration(self, site: Site) -> None:
        self.of.check_calibration(site)

    def observe_chunk(self, query_logits: QueryLogits, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.of.observe_chunk(query_logits, state)

    def passes(self, prompt: Prompt) -> Sequence[Pass]:
        return self.of.passes(prompt)

    def observe_pass(self, query_logits: QueryLogits, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.of.observe_pass(query_logits, state)

    def observe(self, view: View) -> Mapping[str, Tensor]:
        inner = self.of.observe(view)
        new = self._new_scores(attrs.evolve(view, slot_state={**view.slot_state, **inner}))
        old = view.slot_state[_STATE]
        combined = torch.where(old == _NO_HISTORY, new, self._combine(old, new))
        return {**inner, _STATE: combined.masked_fill(~view.candidates, _NO_HISTORY)}

    def tile(self) -> str:
        return "combines scores over time"

    def score(self, view: View) -> Tensor:
        return self.pool.over(view, view.slot_state[_STATE]).masked_fill(~view.candidates, 0.0)

    def _new_scores(self, view: View) -> Tensor:
        """F, [B, K, T]."""
        scores = self.of.score(view)
        if self.scale == "none":
            return scores
        largest = scores.abs().masked_fill(~view.candidates, 0.0).amax(-1, keepdim=True)
        return scores / largest.clamp(min=torch.finfo(torch.float32).tiny)

    def _combine(self, old: Tensor, new: Tensor) -> Tensor:
        """F' of the entries that have an old score."""
        faded = self.decay * old
        if self.update == "max":
            return torch.maximum(faded, new)
        return faded + new if self.update == "sum" else faded + (1 - self.decay) * new
