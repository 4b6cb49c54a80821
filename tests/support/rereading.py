"""Scorers that read prompts again, and policies that score by them."""

import attrs
import torch

from kvpolicy.spec.policy import Weighted
from kvpolicy.stages import Integer, Needs, Pass, Scorer, State, parameter
from tests.support.policies import small


@attrs.frozen
class Reread(Scorer):
    """The most attention that an entry gets while the model reads the prompt again, a chunk at a time."""

    name = "reread"

    chunk: int = parameter(Integer(minimum=1), 5, help="tokens of a pass")
    nearby: bool = False  # whether a pass is shown the entries of its own chunk, and protected ones, only

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


def most_attention(model, tokens, chunk, spans=None):
    """By layer, what every entry of one row gets at most from each chunk read behind the whole: [K, n] float64.

    From the plain model, run on [tokens, chunk] for each chunk, whose eager attention weights are told.
    """
    model.set_attn_implementation("eager")
    count, heads = tokens.shape[1], model.config.num_key_value_heads
    most = [torch.zeros(heads, count, dtype=torch.float64) for _ in range(model.config.num_hidden_layers)]
    for part in tokens.split(chunk, 1):
        with torch.no_grad():
            attentions = model(torch.cat([tokens, part], 1), output_attentions=True, use_cache=False).attentions
        for layer, weights in enumerate(attentions):
            seen = weights[0, :, count:, :count].double().unflatten(0, (heads, -1)).amax((1, 2))
            most[layer] = most[layer].maximum(seen)
    return most
