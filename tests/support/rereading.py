"""Scorers that read prompts again, and policies that score by them."""

import attrs
import torch

from kvpolicy.spec.policy import Weighted
from kvpolicy.stages import Flag, Integer, Needs, Pass, Scorer, State, parameter
from tests.support.policies import small


@attrs.frozen
class Reread(Scorer):
    """The most attention that an entry gets while the model reads the prompt again, a chunk at a time."""

    name = "reread"

    chunk: int = parameter(Integer(minimum=1), 5, help="tokens of a pass")
    nearby: bool = parameter(Flag(), False, help="show a pass the entries of its own chunk and the sinks only")

    def needs(self):
        return Needs(passes=True)

    def slot_state(self):
        return (State("most"),)

    def passes(self, prompt):
        chunks = prompt.tokens.split(self.chunk)
        if not self.nearby:
            return [Pass(chunk) for chunk in chunks]
        sinks = int(prompt.protected.long().cumprod(0).sum())
        found, start = [], prompt.start
        for chunk in chunks:
            stop = start + len(chunk)
            prefix = ((0, min(sinks, start)),) if min(sinks, start) else ()
            found.append(Pass(chunk, (*prefix, (start, stop))))
            start = stop
        return found

    def observe_pass(self, query_logits, state):
        most = query_logits.probabilities.amax((2, 3))
        return {"most": state["most"].maximum(most)}

    def score(self, view):
        return view.slot_state["most"]


def rereading(budget=12, every=4, *, scorer=None, **overrides):
    """A small policy that keeps what is attended to while the prompt is read again."""
    policy = small("snapkv", budget, every, **overrides)
    spec = attrs.evolve(policy.spec, score=(Weighted(scorer or Reread()),))
    return attrs.evolve(policy, spec=spec)


def forwards(model):
    """Counts the forwards of a model: a list that grows, and the handle of its hook."""
    seen = []
    handle = model.register_forward_pre_hook(lambda _module, args, call: seen.append(call), with_kwargs=True)
    return seen, handle


def read(one, cache, tokens, mask=None, **call):
    """The logits of a forward."""
    with torch.no_grad():
        return one(input_ids=tokens, attention_mask=mask, past_key_values=cache, **call).logits
