"""What is updated at every forward from the attention that is computed anyway."""

import math
from collections.abc import Callable, Iterator, Mapping

import attrs
import torch
from torch import Tensor

from kvpolicy.spec.policy import PolicySpec
from kvpolicy.stages import QueryLogits
from kvpolicy.stages.checking.declared import needs_of, slot_state_of
from kvpolicy.stages.checking.returned import check_state
from kvpolicy.stages.checking.untouched import debugging, tensors_of_query_logits, untouched
from kvpolicy.stages.contracts import Observer
from kvpolicy.stages.formats import ALL

ATTENTION = "attention"
MERGE_STATE = "merge."
Update = Callable[[QueryLogits, Mapping[str, Tensor]], Mapping[str, Tensor]]


@attrs.frozen(eq=False)
class ForwardObserver:
    """Updates columns of a store from what the newest `count` queries of a forward see."""

    count: int  # ALL = every query
    columns: Mapping[str, str]  # its own name of a state, and the column that holds it
    update: Update


def state_name(term: int, name: str) -> str:
    """Under which name the store holds the slot state of the scorer in place `term`."""
    return f"score[{term}].{name}"


def observing_plugins(spec: PolicySpec) -> list[tuple[Observer, str]]:
    """The plugins for which the model is observed, and what the names of their columns begin with."""
    scorers = [(weighted.scorer, state_name(term, "")) for term, weighted in enumerate(spec.score)]
    return [*scorers, (spec.merge, MERGE_STATE)]


def forward_observers_of(spec: PolicySpec) -> tuple[ForwardObserver, ...]:
    """The attention mass, if a plugin asks for it, and every plugin that follows."""
    return tuple(_observers(spec))


def _observers(spec: PolicySpec) -> Iterator[ForwardObserver]:
    if any(needs_of(plugin).attention for plugin in spec.shown_views.values()):
        yield ForwardObserver(ALL, {ATTENTION: ATTENTION}, _mass)
    for plugin, prefix in observing_plugins(spec):
        count = needs_of(plugin).forward_queries
        if count:
            columns = {state.name: prefix + state.name for state in slot_state_of(plugin)}
            yield ForwardObserver(count, columns, PluginUpdate(plugin, debugging()))


@attrs.frozen
class PluginUpdate:
    """`observe_forward` of a plugin, whose answer is checked."""

    plugin: Observer
    watched: bool  # told when the plan is made: this is called at every token, and traced by compilers

    def __call__(self, query_logits: QueryLogits, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return checked_update(self.plugin, self.plugin.observe_forward, query_logits, state, watched=self.watched)


def checked_update(
    plugin: Observer, observe: Update, query_logits: QueryLogits, state: Mapping[str, Tensor], *, watched: bool
) -> Mapping[str, Tensor]:
    """What a method of a plugin makes of its state [B, K, T] once it has seen logits, checked; by its own names.

    `watched`: also that it has not written to what it was shown.
    """
    told = hide_faulty(query_logits)  # of NaN it would remember NaN for good
    if watched:
        with untouched(plugin, tensors_of_query_logits(told, state)):
            fresh = observe(told, state)
    else:
        fresh = observe(told, state)
    check_state(plugin, fresh, state)
    return fresh


def _mass(query_logits: QueryLogits, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Attention received, [B, K, T, G], summed over the queries; as `_sound_mass` where something is NaN."""
    probabilities = query_logits.probabilities
    received = probabilities.squeeze(3) if probabilities.shape[3] == 1 else probabilities.sum(3)
    # Only a host can look without making a device wait.
    if received.device.type != "cpu" or math.isnan(received.sum()):
        received = _sound_mass(query_logits)
    return {ATTENTION: state[ATTENTION] + received.transpose(-1, -2)}


def _sound_mass(query_logits: QueryLogits) -> Tensor:
    """[B, K, G, T]: a query whose attention is NaN counts for nothing, or one of them would spoil all entries for good.

    An entry whose own logit is NaN, while others of that query are not, is itself what is wrong: its mass is NaN.
    """
    logits = query_logits.logits
    some = (logits.abs() < torch.inf).any(-1, keepdim=True)
    return query_logits.probabilities.nansum(3).masked_fill((logits.isnan() & some).any(3), torch.nan)


def hide_faulty(query_logits: QueryLogits) -> QueryLogits:
    """The same logits; a query does not see an entry to which its logit is NaN or +inf. Norms like that are 0."""
    own, outputs, hidden = query_logits.own, _finite(query_logits.output_norms), _finite(query_logits.hidden_norms)
    if own is not None:
        own = own.masked_fill(~(own < torch.inf), -torch.inf)
    logits = query_logits.logits
    # Only a host can look without making a device wait. The largest is NaN where one is.
    if logits.device.type == "cpu" and (not logits.numel() or float(logits.amax()) < torch.inf):
        if own is None:
            return query_logits
        return attrs.evolve(query_logits, own=own, output_norms=outputs, hidden_norms=hidden)
    logits = logits.masked_fill(~(logits < torch.inf), -torch.inf)
    scaling, votes = query_logits.scaling, query_logits.log_votes
    return QueryLogits(logits, votes, own, output_norms=outputs, hidden_norms=hidden, scaling=scaling)


def _finite(norms: Tensor | None) -> Tensor | None:
    return None if norms is None else norms.where(norms < torch.inf, 0.0)
