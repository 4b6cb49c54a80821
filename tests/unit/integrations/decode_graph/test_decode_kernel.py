"""Static slots in kernels: attention, what observers see of it, and compressions give what torch gives."""

import attrs
import pytest
import torch

import kvpolicy.attention.attend
from kvpolicy.integrations.transformers.decode_graph import attend, evict
from kvpolicy.plan.plan import compile_policy
from kvpolicy.spec.policy import Weighted
from kvpolicy.stages import Geometry, Needs, Scorer, State
from kvpolicy_kernels import UnsupportedInputError
from tests.support.decisions import Decisions
from tests.support.driving import DIM, GROUP, HEADS
from tests.support.policies import small
from tests.unit.integrations.decode_graph.filling import CAPACITY, blocks, filled, lengths_of

LENGTHS = [CAPACITY, 9, 1]


@attrs.frozen
class Remembers(Scorer):
    """Sums what the newest query sees of an entry."""

    name = "remembers"
    attention: bool = False

    def needs(self):
        return Needs(attention=self.attention, forward_queries=1)

    def slot_state(self):
        return (State("sum"),)

    def observe_forward(self, query_logits, state):
        return {"sum": state["sum"] + query_logits.probabilities.sum((2, 3))}

    def score(self, view):
        return view.slot_state["sum"]


SCORES = {
    "nobody": small("snapkv").spec.score,
    "mass": small("h2o").spec.score,
    "logits": (Weighted(Remembers()),),
    "both": (Weighted(Remembers(attention=True)),),
}


def layers(score):
    """The same entries in two plans, without kernels and with them."""
    spec = attrs.evolve(small("snapkv").spec, score=score)
    geometry = Geometry((0,), HEADS * GROUP, HEADS, DIM)
    plans = [compile_policy(spec, geometry, "cpu", torch.float32, kernels=kernels) for kernels in (False, True)]
    return [filled(plan, LENGTHS) for plan in plans]


def queries():
    return torch.randn(len(LENGTHS), HEADS * GROUP, 1, DIM, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_the_kernel_gives_what_torch_gives(score, monkeypatch):
    plain, fused = layers(score)
    expected = attend.attend_static(plain, queries(), 0.4)
    monkeypatch.setattr(kvpolicy.attention.attend, "_attend", None)
    found = attend.attend_static(fused, queries(), 0.4)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, column in plain.storage.tensors.items():
        torch.testing.assert_close(fused.storage.tensors[name], column, rtol=1e-5, atol=1e-6)


def test_nothing_behind_the_entries_is_read():
    _, fused = layers(SCORES["both"])
    expected = attend.attend_static(fused, queries(), 0.4)
    for tensor in (blocks(fused)["keys"], blocks(fused)["values"]):
        for row, length in enumerate(LENGTHS):
            tensor[row, :, length:] = torch.nan

    assert torch.equal(attend.attend_static(fused, queries(), 0.4), expected)


def test_what_the_kernel_refuses_torch_does(monkeypatch, caplog):
    plain, fused = layers(SCORES["both"])
    expected = attend.attend_static(plain, queries(), 0.4)

    def refuse(*_given, **_named):
        raise UnsupportedInputError("not with these slots")

    monkeypatch.setattr(kvpolicy.attention.attend, "attend_in_kernel", refuse)
    assert torch.equal(attend.attend_static(fused, queries(), 0.4), expected)
    assert "not with these slots" in caplog.text


@pytest.mark.parametrize("due", [(True, False, True), (False, True, False), (True, True, True)])
@pytest.mark.parametrize("name", ["snapkv", "rkv", "h2o", "gkv", "tova"])
def test_layers_are_compressed_together_as_they_are_alone(name, due):
    """Two layers with different budgets; rows that are not due keep everything."""
    geometry = Geometry((0, 1), HEADS * GROUP, HEADS, DIM)
    results, decisions = [], Decisions()
    for kernels, mode in ((False, decisions.watched), (True, decisions.followed)):
        plan = compile_policy(small(name, 7).spec, geometry, "cpu", torch.float32, kernels=kernels)
        pair = [filled(plan, [CAPACITY, 12, 13], seed) for seed in (1, 2)]
        budgets, nan = torch.tensor([[7, 8, 9], [9, 7, 8]]), torch.zeros(2, dtype=torch.int64)
        with mode():
            evict.evict(pair, torch.tensor([due, due]), budgets, torch.tensor([CAPACITY, 12, 13]), nan)
        results.append((pair, nan))
    (plain, expected), (fused, found) = results

    assert torch.equal(found, expected)
    for one, other in zip(plain, fused, strict=True):
        assert lengths_of(other) == lengths_of(one)
        expected, found = one.storage.tensors, other.storage.tensors
        held = expected["positions"] >= 0
        for column, values in expected.items():
            torch.testing.assert_close(found[column][held], values[held], rtol=1e-5, atol=1e-6)
        assert torch.equal(found["positions"], expected["positions"])
