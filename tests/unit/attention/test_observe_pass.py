"""What a scorer is shown of a pass, against loops over rows, heads and entries."""

import math

import attrs
import pytest
import torch

from kvpolicy.attention import blockwise
from kvpolicy.attention.observe_pass import observe_pass
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.cache.request.pass_batch import PassBatch
from kvpolicy.plan.passes import pass_observers_of
from kvpolicy.plan.plan import POSITIONS
from kvpolicy.spec.policy import Weighted
from kvpolicy.stages import Pass
from kvpolicy_plugins.scorers.attention_based.reconstruction import Reconstruction
from tests.support import storage as stored
from tests.support.driving import DIM, GROUP, HEADS, drive, new_layer, output_projection, plan_of
from tests.support.policies import small
from tests.support.rereading import Reread

SCALING, COUNT = 0.5, 4
STATE = "score[0].most"


@attrs.frozen
class Plain(Reread):
    """Asks for nothing, so that layers can be driven without a model."""

    name = "plain"

    def needs(self):
        return attrs.evolve(super().needs(), passes=False)


def layer_of(form):
    """A layer of two rows whose heads hold as many entries, or not, plain or packed or with votes."""
    overrides = {
        "even": {},
        "ragged": {"allocate": {"heads": {"use": "adaptive", "floor": 0.1}}},
        "packed": {"store": {"use": "kivi", "bits": 4, "group": 3, "residual": 3}},
        "votes": {"merge": {"use": "keepkv", "threshold": -1, "window": 4}},
    }[form]
    policy = small("snapkv", **overrides)
    spec = attrs.evolve(policy.spec, score=(*policy.spec.score, Weighted(Plain())))
    layer = new_layer(plan_of(attrs.evolve(policy, spec=spec)))
    drive(layer, 30, 2, 9, rows=2)
    return layer


PASSES = {
    "all": {0: Pass(torch.arange(4)), 1: Pass(torch.arange(4))},
    "shorter": {0: Pass(torch.arange(4)), 1: Pass(torch.arange(2))},
    "one row": {1: Pass(torch.arange(4))},
    "spans": {0: Pass(torch.arange(4), ((0, 2), (35, 40))), 1: Pass(torch.arange(3))},
    "nothing": {0: Pass(torch.arange(4), ((41, 42),)), 1: Pass(torch.arange(4), ())},
}


@pytest.mark.parametrize("weigh", ["none", "output_norm"])
@pytest.mark.parametrize("blocks", [1, 2**20])
@pytest.mark.parametrize("given", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("form", ["even", "ragged", "packed", "votes"])
def test_the_largest_probability_is_that_of_a_loop(form, given, blocks, weigh, monkeypatch):
    """With `output_norm` times the length of the value behind the projection, by that of the query's hidden state."""
    monkeypatch.setattr(blockwise, "_LOGITS", blocks)
    layer = layer_of(form)
    held = layer.storage
    spec = attrs.evolve(layer.plan.spec, score=(layer.plan.spec.score[0], Weighted(Reconstruction(weigh=weigh))))
    (observer,) = pass_observers_of(spec)
    observer = attrs.evolve(observer, columns={"most": "score[1].most"})
    batch = PassBatch.of(given, layer.num_tokens, torch.device("cpu"))
    random = torch.Generator().manual_seed(1)
    queries = torch.randn(2, HEADS * GROUP, batch.count, DIM, generator=random)
    own = torch.randn(2, HEADS, batch.count, DIM, generator=random)
    for row in range(2):
        for head in range(HEADS):
            held.slots.segment("score[1].most", row, head).fill_(0.01)
    before = {name: tensor.clone() for name, tensor in held.slots.tensors.items()}

    hidden = torch.rand(2, batch.count, generator=random) if weigh == "output_norm" else None
    factors = None if hidden is None else (output_projection(), hidden)
    called = QueryBatch(queries, batch.positions, padded=batch.padded, scaling=SCALING, hidden_norms=hidden)
    observe_pass(held, called, own, batch, observer, None if factors is None else factors[0])

    for name, tensor in held.slots.tensors.items():
        assert name == "score[1].most" or torch.equal(tensor, before[name])
    for row in range(2):
        for head in range(HEADS):
            found = held.slots.segment("score[1].most", row, head)
            expected = loop(layer, given.get(row), row, head, queries, own, factors)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def loop(layer, one, row, head, queries, own, factors):
    """The largest probability that each entry of a head gets, at least 0.01."""
    values = stored.segment(layer.storage, "values", row, head)
    positions = layer.storage.slots.segment(POSITIONS, row, head).tolist()
    keys = stored.segment(layer.storage, "keys", row, head)
    columns = layer.storage.slots.columns
    votes = layer.storage.slots.segment("log_votes", row, head).tolist() if "log_votes" in columns else [0] * len(keys)
    worth = [0.01] * len(positions)
    if one is None:
        return torch.tensor(worth)
    spans = ((0, 10**6),) if one.spans is None else one.spans
    shown = [slot for slot, place in enumerate(positions) if any(a <= place < b for a, b in spans)]
    for number in range(len(one.tokens)):
        for each in range(GROUP):
            query = queries[row, head * GROUP + each, number] * SCALING
            weights = {slot: math.exp(query @ keys[slot] + votes[slot]) for slot in shown}
            total = sum(weights.values()) + sum(math.exp(query @ key) for key in own[row, head, : number + 1])
            for slot, weight in weights.items():
                length = 1.0
                if factors is not None:
                    added = values[slot] @ factors[0][head * GROUP + each]
                    length = math.sqrt(sum(number * number for number in added.tolist())) / float(
                        factors[1][row, number]
                    )
                worth[slot] = max(worth[slot], weight / total * length)
    return torch.tensor(worth)
