"""Scorer `history`: combines scores of another scorer over time."""

from collections.abc import Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Choice, Nested, Number, Plugged, Scorer, State, View, parameter
from kvpolicy_plugins.scorers.shared.around import ScorerAround
from kvpolicy_plugins.scorers.shared.pooling import Pool

_STATE = "history"
_NO_HISTORY = -torch.inf


@attrs.frozen
class History(ScorerAround):
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

    def slot_state(self) -> tuple[State, ...]:
        return (*self.of.slot_state(), State(_STATE, fill=_NO_HISTORY))

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
