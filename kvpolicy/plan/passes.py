"""Scorers that read prompts again: what they are asked, and what they remember of it."""

from collections.abc import Iterator, Mapping

import attrs
from torch import Tensor

from kvpolicy.errors import PolicyError, Problem
from kvpolicy.plan.forward_observers import checked_update, state_name
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.stages import Needs, Pass, Prompt, QueryLogits, Scorer
from kvpolicy.stages.checking.declared import needs_of, passes_of, reads_prompts, slot_state_of
from kvpolicy.stages.checking.untouched import debugging, tensors_of_prompt, watching


@attrs.frozen(eq=False)
class PassObserver:
    """One scorer that reads prompts again; all that it answers is checked."""

    scorer: Scorer
    columns: Mapping[str, str]  # its own name of a state, and the column that holds it
    needs: Needs

    def passes(self, prompt: Prompt) -> tuple[Pass, ...]:
        """What it wants to read behind a row's prompt. Raises PluginContractError for what is no token sequence."""
        with watching(self.scorer, lambda: tensors_of_prompt(prompt)):
            return passes_of(self.scorer, prompt)

    def update(self, query_logits: QueryLogits, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """New values of its state [B, K, T] once queries of a pass have been seen, by its own names."""
        return checked_update(self.scorer, self.scorer.observe_pass, query_logits, state, watched=debugging())


def pass_observers_of(spec: PolicySpec) -> tuple[PassObserver, ...]:
    """The scorers of a policy that read prompts again, in its order.

    Raises PluginContractError for one that could not remember a pass, PolicyError where prompts are not compressed.
    """
    observers = tuple(_observers(spec))
    if observers and not spec.compress.prefill:
        name = observers[0].scorer.name
        message = f"must be true: {name} reads a prompt again when it is about to be compressed"
        raise PolicyError([Problem("compress.prefill", message)])
    return observers


def _observers(spec: PolicySpec) -> Iterator[PassObserver]:
    for term, weighted in enumerate(spec.score):
        if reads_prompts(weighted.scorer):
            states = slot_state_of(weighted.scorer)
            columns = {state.name: state_name(term, state.name) for state in states}
            yield PassObserver(weighted.scorer, columns, needs_of(weighted.scorer))
