"""Scorers that are shown the queries of each chunk of tokens over the entries of the same chunk."""

from collections.abc import Iterator, Mapping, Sequence

import attrs
from torch import Tensor

from kvpolicy.plan.forward_observers import checked_update, state_name
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.stages import QueryLogits, Scorer
from kvpolicy.stages.checking.declared import needs_of, observes_chunks, slot_state_of
from kvpolicy.stages.checking.untouched import debugging


@attrs.frozen(eq=False)
class ChunkObserver:
    """One scorer that observes chunks; all that it answers is checked."""

    scorer: Scorer
    size: int  # tokens of a chunk
    first: int  # position of the token that begins the first one
    columns: Mapping[str, str]  # its own name of a state, and the column that holds it
    fills: Mapping[str, float]  # what the state of an entry is before its chunk has been seen

    def chunk_at(self, position: int) -> range:
        """The positions of the chunk that a position belongs to; empty for one before the first chunk."""
        if position < self.first:
            return range(0)
        start = position - (position - self.first) % self.size
        return range(start, start + self.size)

    def update(self, query_logits: QueryLogits, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """New values of its state [B, K, T] once queries of a chunk have been seen, by its own names."""
        return checked_update(self.scorer, self.scorer.observe_chunk, query_logits, state, watched=debugging())


def chunk_observers_of(spec: PolicySpec) -> tuple[ChunkObserver, ...]:
    """The scorers of a policy that observe chunks, in its order.

    Raises PluginContractError for one that could not remember what it has seen.
    """
    return tuple(_observers(spec))


def most_queries(observers: Sequence[ChunkObserver]) -> int:
    """How many queries a chunk may have that is not complete; 0 where nobody observes chunks."""
    return max((observer.size - 1 for observer in observers), default=0)


def _observers(spec: PolicySpec) -> Iterator[ChunkObserver]:
    for term, weighted in enumerate(spec.score):
        scorer = weighted.scorer
        if observes_chunks(scorer):
            needs, states = needs_of(scorer), slot_state_of(scorer)
            columns = {state.name: state_name(term, state.name) for state in states}
            fills = {state.name: state.fill for state in states}
            yield ChunkObserver(scorer, needs.chunk, needs.chunk_start, columns, fills)
