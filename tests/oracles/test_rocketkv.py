"""RocketKV (arXiv:2502.14051): a prompt is thinned out once, then every step attends to a few of the entries alone.

Which of the prompt stay: SnapKV's votes, summed over queries and query heads, the largest of 63 neighbours. Which are
attended: keys are taken in groups of `chunk`, for each channel by the largest of the group where the sum of the queries
of a KV head is positive, by the smallest where it is not. Of the r channels in which these queries are largest on
average the products with that are divided by the square root of D times the part of a query's magnitude that is in
them; softmax over all entries, mean over the query heads, and the highest.
"""

import math

import attrs
import numpy as np
import pytest
import torch

from kvpolicy.policy import Policy
from tests.oracles.comparison import shipped
from tests.oracles.observed import attention, pooled
from tests.oracles.simulation import Head, Method, Simulation, softmax
from tests.support.models import build, model, prompt
from tests.support.oracle import attending_by
from tests.support.policies import held

CLEAR = 1e-5


class Rocket(Method):
    chunk, channels, read = 3, 5, 7

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        return [pooled(attention(head).sum((0, 1))[self.candidates(head)], 63) for head in heads]

    def due(self, heads: list[Head], allowed: int, *, decoding: bool) -> bool:
        return not decoding and super().due(heads, allowed, decoding=False)

    def attended(self, head, queries, *, decoding):
        logits = head.logits(queries)
        if decoding and len(head.entries) > self.read:
            scores = self.estimated(head, queries[0][1])
            looked_at = self.best(scores, self.read)
            for slot in set(range(len(scores))) - set(looked_at):
                logits[..., slot] = -np.inf
        return logits

    def estimated(self, head: Head, group: np.ndarray) -> np.ndarray:
        """[T], of queries [G, D]."""
        keys, dim = [entry.key for entry in head.entries], group.shape[1]
        sizes = [np.mean([abs(query[channel]) for query in group]) for channel in range(dim)]
        used = sorted(range(dim), key=lambda channel: -sizes[channel])[: self.channels]
        found = []
        for query in group:
            part = sum(abs(query[channel]) for channel in used) / sum(abs(number) for number in query)
            logits = []
            for slot in range(len(keys)):
                first = slot // self.chunk * self.chunk
                own = keys[first : first + self.chunk]
                product = 0.0
                for channel in used:
                    furthest = max if sum(other[channel] for other in group) > 0 else min
                    product += query[channel] * furthest(key[channel] for key in own)
                logits.append(product / math.sqrt(dim * part))
            found.append(softmax(np.array(logits)))
        return np.mean(found, 0)


def outputs(one, tokens, mask, sizes, cache=None):
    """Logits of the real tokens of every forward, and the cache."""
    start, found = 0, []
    with torch.no_grad():
        for size in sizes:
            end = start + size
            given = {"attention_mask": mask[:, :end], "past_key_values": cache, "use_cache": True}
            result = one(tokens[:, start:end], **given)
            found.append(result.logits[mask[:, start:end].bool()])
            cache, start = result.past_key_values, end
    return torch.cat(found), cache


@pytest.mark.parametrize(("chunk", "channels", "read"), [(3, 5, 7), (1, 8, 6), (4, 2, 9)])
def test_steps_attend_to_what_a_summary_favours(chunk, channels, read):
    given, queries, sizes = (15, "never", 0, 4), 4, (26, *[1] * 9, 4, *[1] * 6)
    changed = {"queries": queries, "chunk": chunk, "channels": channels / 8}
    policy = shipped("rocketkv", *given, **changed)
    policy = Policy(attrs.evolve(policy.spec, read=attrs.evolve(policy.spec.read, budget=read)))
    length = sum(sizes)
    for seed in range(8):
        tokens, mask = prompt(length, length - 9, seed=seed)
        method = type("Sized", (Rocket,), {"chunk": chunk, "channels": channels, "read": read})(*given, queries)
        plain = build()
        simulation = Simulation(method, mask.bool().numpy(), plain.config.num_hidden_layers)
        with attending_by(plain, simulation):
            expected, _ = outputs(plain, tokens, mask, sizes)
        if method.margin > CLEAR:
            break
    else:
        raise AssertionError(f"none of the prompts has decisions that rounding could not turn: {method.margin}")
    with policy.attach(model()) as attachment:
        found, cache = outputs(attachment.model, tokens, mask, sizes, attachment.cache())
    assert [
        [[[p for p in head if p >= 0] for head in row] for row in layer] for layer in held(cache)
    ] == simulation.held()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    unlike, _ = outputs(build(), tokens, mask, sizes)
    assert (unlike - found).abs().max() > 0.05
