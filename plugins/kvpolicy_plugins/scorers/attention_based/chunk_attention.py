"""Scorer `chunk_attention`: attention within chunks of the sequence, not causal."""

from collections.abc import Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Flag, Integer, Needs, Nested, QueryLogits, Scorer, State, View, parameter
from kvpolicy_plugins.scorers.shared.pooling import Pool


@attrs.frozen
class ChunkAttention(Scorer):
    """What an entry gets from all queries of its chunk, later ones included: the other part of Compactor (section 3).

    What follows the first `sinks` tokens is cut into chunks of `chunk` tokens. In each,

    1. probabilities = softmax(q·k) of every query over all entries of the chunk, those of later tokens too; without the
       model's factor on q·k unless `scaled`, as published;
    2. the sum over the queries, the mean over the query heads of a KV head: on average 1 for each entry;
    3. times ‖v‖₂, unless `value_norm` is off; 4. `pool`, in Compactor the mean of three neighbours. Float32
       [B, K, T].

    The last chunk may be shorter. In a chunk that is complete only after some of its entries were evicted, the queries
    of the tokens that a head still holds count, over these, so the average stays 1. What is in no chunk counts as 1:
    the first `sinks`, and with `compress: {every: never}` tokens that were generated.

    Published code fills the last chunk with zeros, whose keys take part of the attention, and whose queries give all
    entries the same: `zeros` does that. It also leaves out the last four tokens of a prompt, as keys and as queries.
    """

    name: ClassVar[str] = "chunk_attention"
    reference: ClassVar[str] = "arXiv:2507.08143"

    chunk: int = parameter(Integer(minimum=1, maximum=2**13), 256, help="tokens of a chunk")
    sinks: int = parameter(Integer(minimum=0, maximum=2**16), 8, help="tokens before the first chunk")
    scaled: bool = parameter(Flag(), False, help="multiply q·k by the model's factor, as its attention does")
    zeros: bool = parameter(Flag(), False, help="fill chunks that lack entries with keys and queries of zeros")
    value_norm: bool = parameter(Flag(), True, help="multiply by the norm of the value")
    pool: Pool = parameter(Nested(Pool), Pool(), help="smoothing over neighbouring candidates")

    def needs(self) -> Needs:
        return Needs(chunk=self.chunk, chunk_start=self.sinks)

    def slot_state(self) -> tuple[State, ...]:
        return (State("excess"),)  # what an entry gets beyond 1, the average: one that no chunk holds counts as that

    def in_any_order(self) -> bool:
        return True

    def tile(self) -> str:
        return "its scores are made while chunks of tokens come"

    def observe_chunk(self, query_logits: QueryLogits, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not self.scaled:
            query_logits = attrs.evolve(query_logits, logits=query_logits.logits / query_logits.scaling)
        given = self._with_zeros(query_logits) if self.zeros else query_logits.probabilities.sum(3)
        seen = query_logits.logits > -torch.inf
        average = (seen / seen.sum(-1, keepdim=True).clamp(min=1)).sum(3)
        return {"excess": state["excess"] + (given - average).mean(2)}

    def _with_zeros(self, query_logits: QueryLogits) -> Tensor:
        """What queries of a chunk that zeros fill give, [B, K, G, T]; each own one stands for a part of the zeros."""
        held = (query_logits.logits > -torch.inf).sum(-1)  # [B, K, G, w], n, or 0 for a query that sees nothing
        missing = self.chunk - held
        attended = attrs.evolve(query_logits, own=missing.float().log()).probabilities.sum(3)
        by_zeros = (missing / (self.chunk * held.clamp(min=1))).masked_fill(held == 0, 0.0).sum(3)
        return attended + by_zeros[..., None]

    def score(self, view: View) -> Tensor:
        received = 1 + view.slot_state["excess"]
        if self.value_norm:
            norms: Tensor = torch.linalg.vector_norm(view.values.float(), dim=-1)
            received = received * norms
        return self.pool.over(view, received)
