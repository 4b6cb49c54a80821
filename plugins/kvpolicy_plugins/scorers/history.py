"""A score that remembers."""

from collections.abc import Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Choice, Needs, Nested, Number, Plugged, Scorer, State, View, parameter
from kvpolicy_plugins.scorers.shared.pooling import Pool

_STATE = "history"
_NONE_YET = -torch.inf


@attrs.frozen
class History(Scorer):
    """Another scorer's scores F, joined with what each entry scored before: the global score of G-KV.

    1. `scale: max` divides F by its largest magnitude among a head's candidates;
    2. with the old score O of an entry, F' is max(decay·O, F), or decay·O + (1 - decay)·F for `mean`, or
       decay·O + F for `sum`; an entry that was no candidate before has no old score, and F' = F;
    3. F' is remembered, and pooled it is the score.
    """

    name: ClassVar[str] = "history"
    reference: ClassVar[str] = "arXiv:2512.00504"

    of: Scorer = parameter(Plugged("score"), help="the scorer whose scores are remembered")
    update: str = parameter(Choice(("max", "mean", "sum")), "max", help="how old and new scores are joined")
    decay: float = parameter(Number(minimum=0, maximum=1), 0.8, help="what an old score is worth (alpha)")
    scale: str = parameter(
        Choice(("none", "max")), "max", help="divide new scores by their maximum before they are joined"
    )
    pool: Pool = parameter(Nested(Pool), Pool(), help="smoothing over neighbouring candidates, not remembered")

    def __attrs_post_init__(self) -> None:
        if any(state.name == _STATE for state in self.of.slot_state()):
            raise ParameterError(f"of: must be a scorer without a history of its own: {self.of}")

    def needs(self) -> Needs:
        return self.of.needs()

    def slot_state(self) -> tuple[State, ...]:
        return (*self.of.slot_state(), State(_STATE, fill=_NONE_YET))

    def in_any_order(self) -> bool:
        return self.of.in_any_order()

    def observe(self, view: View) -> Mapping[str, Tensor]:
        inner = self.of.observe(view)
        new = self._new_scores(attrs.evolve(view, slot_state={**view.slot_state, **inner}))
        old = view.slot_state[_STATE]
        joined = torch.where(old == _NONE_YET, new, self._join(old, new))
        return {**inner, _STATE: joined.masked_fill(~view.candidates, _NONE_YET)}

    def tile(self) -> str:
        return "joins what it finds with what it remembers"

    def score(self, view: View) -> Tensor:
        return self.pool.over(view, view.slot_state[_STATE]).masked_fill(~view.candidates, 0.0)

    def _new_scores(self, view: View) -> Tensor:
        """F, [B, K, T]."""
        scores = self.of.score(view)
        if self.scale == "none":
            return scores
        largest = scores.abs().masked_fill(~view.candidates, 0.0).amax(-1, keepdim=True)
        return scores / largest.clamp(min=torch.finfo(torch.float32).tiny)

    def _join(self, old: Tensor, new: Tensor) -> Tensor:
        """F' of the entries that have an old score."""
        faded = self.decay * old
        if self.update == "max":
            return torch.maximum(faded, new)
        return faded + new if self.update == "sum" else faded + (1 - self.decay) * new
