"""A plugin that writes to what it is shown is found out: by the conformance suite, and at run time by who debugs."""

import attrs
import pytest
import torch

import kvpolicy
from kvpolicy.errors import PluginContractError
from kvpolicy.stages import HeadAllocator, Merger, Needs, Reader, ReadRequest, Scorer, Selector, State
from kvpolicy.stages.checking.returned import check_state
from kvpolicy.stages.checking.untouched import DEBUG
from kvpolicy.stages.conformance import conformance_cases
from kvpolicy_plugins.allocators.uniform_heads import UniformHeads
from kvpolicy_plugins.mergers.weighted import Weighted as WeightedMerger
from kvpolicy_plugins.readers.pages import Pages
from kvpolicy_plugins.selectors.topk import TopK
from tests.support.models import generate, model, prompt

WRITES = {
    "keys": lambda view: view.keys.mul_(2),
    "keys, with what they were": lambda view: view.keys.clamp_(-1e9, 1e9),
    "keys, behind torch's back": lambda view: view.keys.data.mul_(2),
    "values": lambda view: view.values[..., 0].zero_(),
    "positions": lambda view: view.positions.add_(0),
    "queries": lambda view: view.queries.neg_(),
    "attention": lambda view: view.attention.add_(1),
    "candidates": lambda view: view.candidates.fill_(False),
    "valid": lambda view: view.valid.logical_and_(view.valid),
    "logits": lambda view: view.logits.softmax(-1, out=view.logits) if False else view.logits.exp_(),
    "mine": lambda view: view.slot_state["mine"].add_(1),
}


def writer(write):
    def score(_self, view):
        write(view)
        return view.keys.float().norm(dim=-1)

    body = {
        "name": "writer",
        "score": score,
        "needs": lambda _self: Needs(queries=2, attention=True),
        "slot_state": lambda _self: (State("mine"),),
    }
    return attrs.frozen(type("Writer", (Scorer,), body))()


@pytest.mark.parametrize("name", WRITES)
def test_conformance_finds_a_scorer_that_writes(name):
    case = dict(conformance_cases(writer(WRITES[name])))["leaves its input alone"]

    with pytest.raises(
        PluginContractError, match=f"changed its input '{name.partition(',')[0]}', expected it to be read"
    ):
        case()


@pytest.mark.parametrize("name", ["keys", "keys, with what they were", "mine", "candidates", "attention"])
def test_debug_switch_finds_it_while_a_model_runs(name, monkeypatch):
    policy = kvpolicy.load("h2o", budget=24, protect={"recent": 8})
    term = attrs.evolve(policy.spec.score[0], scorer=writer(WRITES[name]))
    policy = attrs.evolve(policy, spec=attrs.evolve(policy.spec, score=(term,)))
    tokens, mask = prompt(40, 30)
    monkeypatch.setenv(DEBUG, "1")

    with (
        policy.attach(model()),
        pytest.raises(PluginContractError, match=f"scorer 'writer' changed its input '{name[:4]}"),
    ):
        generate(model(), tokens, mask, count=2)


def test_debug_switch_changes_nothing_else(monkeypatch):
    tokens, mask = prompt(40, 30)
    for name in ("gkv", "d2o", "keepkv", "adakv", "quest"):
        policy = kvpolicy.load(name, **({} if name == "quest" else {"budget": 24, "protect": {"recent": 8}}))
        with policy.attach(model()):
            expected = generate(model(), tokens, mask, count=4)
        with monkeypatch.context() as patch, policy.attach(model()):
            patch.setenv(DEBUG, "1")
            found = generate(model(), tokens, mask, count=4)
        assert all(torch.equal(*pair) for pair in zip(found.logits, expected.logits, strict=True))


class WritingHeads(UniformHeads):
    def allocate(self, question):
        question.room.add_(0)
        return super().allocate(question)


class WritingSelector(TopK):
    def select(self, request):
        request.scores.nan_to_num_()
        return super().select(request)


class WritingMerger(WeightedMerger):
    def merge(self, view, kept):
        kept.add_(0)
        return super().merge(view, kept)


class WritingReader(Pages):
    def choose(self, question: ReadRequest):
        question.queries.mul_(1)
        return super().choose(question)


@pytest.mark.parametrize(
    ("plugin", "name"),
    [
        (WritingHeads(), "room"),
        (WritingSelector(), "scores"),
        (WritingMerger(), "kept"),
        (WritingReader(), "queries"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_conformance_finds_it_in_other_stages(plugin, name):
    assert isinstance(plugin, (HeadAllocator, Selector, Merger, Reader))
    case = dict(conformance_cases(plugin))["leaves its input alone"]

    with pytest.raises(PluginContractError, match=f"changed its input '{name}'"):
        case()


@pytest.mark.parametrize(
    ("fresh", "message"),
    [
        (None, "returned null as its state, expected tensors by name"),
        ({"other": torch.zeros(1, 2, 3)}, r"returned state 'other', expected only \['mine'\]"),
        ({"mine": 3}, "returned int, expected a tensor"),
        ({"mine": torch.zeros(1, 2)}, "returned shape"),
        ({"mine": torch.zeros(1, 2, 3).half()}, "returned torch.float16"),
    ],
)
def test_state_that_was_not_declared_is_refused(fresh, message):
    with pytest.raises(PluginContractError, match=message):
        check_state(TopK(), fresh, {"mine": torch.zeros(1, 2, 3)})
