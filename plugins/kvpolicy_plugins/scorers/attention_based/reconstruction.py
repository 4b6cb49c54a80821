"""Scorer `reconstruction`: what the model looks at when it repeats the prompt."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
from torch import Tensor

from kvpolicy.stages import Choice, Integer, Needs, Pass, Prompt, QueryLogits, Scorer, State, View, parameter


@attrs.frozen
class Reconstruction(Scorer):
    """The largest attention that an entry gets while the model repeats the prompt (KVzip, sections 3.2 and 3.3).

    What follows the sinks (the protected entries at the start) is cut into chunks of `chunk` tokens. Each is forwarded
    once more behind the whole prompt, preceded by the last `overlap` tokens of the chunk before it, as the answer of a
    model that repeats the prompt would be.

    1. probabilities = softmax(scaling · q·k) of the queries of that forward over the sinks, the entries of the chunk,
       and those of the forward itself up to the query;
    2. score = the largest one that any of these queries gives, in any query head of the KV head's group.

    With `weigh: output_norm` (KVzip+), the probability that a query of query head g gives an entry is multiplied with
    ‖v W_g‖₂ / ‖h‖₂ before the maximum: how much the entry adds to the hidden state, by its value v behind the slice W_g
    of the output projection, relative to the hidden state h that the layer's attention is given for the query's token,
    normalised as it is. That h is what kvpress divides by. A query whose h is 0 gives nothing.

    No question takes part, so what is kept serves every question about the prompt.

    The paper begins each pass with an instruction to repeat the context, whose wording hardly matters there. A policy
    knows no tokenizer, so here a pass begins with the overlap. Entries that come later score 0.
    """

    name: ClassVar[str] = "reconstruction"
    reference: ClassVar[str] = "arXiv:2505.23416"

    chunk: int = parameter(Integer(minimum=1, maximum=2**20), 2000, help="m, tokens of the prompt that a pass repeats")
    overlap: int = parameter(
        Integer(minimum=0, maximum=2**16), 8, help="tokens of the chunk before, with which a pass begins"
    )

    weigh: str = parameter(
        Choice(("none", "output_norm")), "none", help="what attention is multiplied with: output_norm = KVzip+"
    )

    def needs(self) -> Needs:
        plus = self.weigh == "output_norm"
        return Needs(passes=True, output_projection=plus, hidden_norms=plus)

    def slot_state(self) -> tuple[State, ...]:
        return (State("most"),)

    def in_any_order(self) -> bool:
        return True

    def tile(self) -> str:
        return "its scores are made while the prompt is read again"

    def passes(self, prompt: Prompt) -> Sequence[Pass]:
        sinks = int(prompt.protected.long().cumprod(0).sum())  # in host memory
        context = prompt.tokens[max(0, sinks - prompt.start) :]
        start = prompt.start + len(prompt.tokens) - len(context)
        shared = ((0, sinks),) if sinks else ()
        passes = []
        for begin in range(0, len(context), self.chunk):
            tokens = context[max(0, begin - self.overlap) : begin + self.chunk]
            end = min(begin + self.chunk, len(context))
            passes.append(Pass(tokens, (*shared, (start + begin, start + end))))
        return passes

    def observe_pass(self, query_logits: QueryLogits, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        worth = query_logits.probabilities  # [B, K, G, w, T]
        if self.weigh == "output_norm":
            outputs, hidden = query_logits.norms
            shares = (1 / hidden).masked_fill(hidden == 0, 0.0)
            weighed = worth * shares[:, None, None, :, None]
            worth = weighed.amax(3, keepdim=True) * outputs[:, :, :, None]
        return {"most": state["most"].maximum(worth.amax((2, 3)))}

    def score(self, view: View) -> Tensor:
        return view.slot_state["most"]
