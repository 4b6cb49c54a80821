"""Compression in kernels, on a model: the same tokens, and all layers of a decode step in one go."""

import pytest
import torch

import kvpolicy
from kvpolicy.cache import scheduler
from kvpolicy.errors import BudgetWarning
from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.integrations.transformers.models.support import geometry_of
from kvpolicy.plan.compress import step
from kvpolicy.plan.plan import compile_policy
from kvpolicy_kernels import UnsupportedInputError
from tests.support.alone import repeat
from tests.support.decisions import Decisions
from tests.support.models import build, generate, prompt
from tests.support.policies import held, small

LAYERS, STEPS = 2, 9
FEW = 6  # with the first compression of the prompt, one of a decode step
POLICIES = {
    "snapkv": small("snapkv", 20, 4, protect={"recent": 8}),
    "rkv": small("rkv", 20, 4, protect={"recent": 8}),
    "adakv": small("adakv", 20, 4, protect={"recent": 8}),
    "gkv": small("gkv", 20, 4, protect={"recent": 8}),
    "pyramidkv": small("pyramidkv", 20, 4, protect={"recent": 4}),
    "criticaladakv": small("criticaladakv", 20, 4, protect={"recent": 8}),
    "blend": small("blend", 20, 4, protect={"recent": 8}),
}


CASES = [*((name, (25, 14)) for name in POLICIES), ("adakv", (28,))]


@pytest.mark.parametrize(("name", "rows"), CASES, ids=str)
def test_kernels_choose_what_the_references_choose(name, rows):
    """Token by token, in a batch with a shorter row, over several compressions."""
    model = build("llama", num_hidden_layers=LAYERS)
    tokens, mask = prompt(*rows)
    decisions = Decisions()
    with decisions.watched():
        expected, plain = _generate(model, POLICIES[name], tokens, mask, kernels=False, count=FEW)
    with decisions.followed():
        _, fused = _generate(model, POLICIES[name], tokens, mask, expected, kernels=True, count=FEW)

    assert decisions.repeated
    assert [one.held for one in fused.layers] == [one.held for one in plain.layers]
    assert max(one.compressions for one in fused.layers) >= 2


def test_layers_wait_for_the_end_of_a_decode_step(monkeypatch):
    """The prompt is compressed layer by layer, decode steps all layers at once, in place and by one launch each."""
    views, moved = [], []
    inner, compact_layers = step.score_layers, scheduler.compact_layers

    def score_layers(spec, fusion, shown):
        views.append(len(shown))
        return inner(spec, fusion, shown)

    monkeypatch.setattr(step, "score_layers", score_layers)
    monkeypatch.setattr(scheduler, "compact_layers", lambda *a, **k: moved.append(compact_layers(*a, **k)) or moved[-1])
    model = build("llama", num_hidden_layers=LAYERS)
    _generate(model, POLICIES["rkv"], *prompt(28), kernels=True)

    assert views == [1] + [1] * LAYERS + [LAYERS] * 2  # first of all a trial, when the plan is made
    assert moved == [[True]] * LAYERS + [[True] * LAYERS] * 2


REGIONS = {"system": (2, 7), "tools": [(12, 15)]}
BY_PLACE = {
    "regions": {"regions": ["system", "tools"]},
    "prompt": {"prompt": True},
}
PROTECTING = [*((name, "regions") for name in ("rkv", "adakv", "h2o", "global"))]
PROTECTING += [("snapkv", "prompt"), ("global", "prompt")]


def protecting(name, what):
    """A policy that protects some of the request beside both ends; its budget holds more than that."""
    rest = {"protect": {"sinks": 2, "recent": 4, **BY_PLACE[what]}}
    if name == "global":
        name, rest = "snapkv", {**rest, "allocate": {"joint": "global"}}
    return small(name, 27 if what == "prompt" else 20, 4, **rest)


@pytest.mark.parametrize(("name", "what"), PROTECTING, ids=str)
def test_kernels_choose_what_the_references_choose_beside_protected_spans(name, what):
    """A prompt and decode steps, in a batch with a shorter row; what is protected stays in every head."""
    model = build("llama", num_hidden_layers=LAYERS)
    tokens, mask = prompt(*((22, 15) if what == "prompt" else (28, 17)))
    decisions, options = Decisions(), {"count": 16 if what == "prompt" else FEW}
    with decisions.watched():
        expected, plain, _ = _with_regions(model, protecting(name, what), tokens, mask, kernels=False, **options)
    with decisions.followed():
        _, fused, slots = _with_regions(model, protecting(name, what), tokens, mask, expected, kernels=True, **options)

    assert decisions.repeated
    assert [one.held for one in fused.layers] == [one.held for one in plain.layers]
    assert max(one.compressions for one in fused.layers) >= 2
    for layer in slots:
        for row, heads in enumerate(layer):
            prompted = int(mask[row].sum())
            stays = set(range(prompted)) if what == "prompt" else {2, 3, 4, 5, 6, 12, 13, 14}
            assert all(set(one) >= stays for one in heads)


def test_layers_with_protected_spans_share_the_launches_of_a_decode_step(monkeypatch):
    """As many launches as without protected spans: the prompt layer by layer, decode steps all layers at once."""
    views, inner = [], step.score_layers

    def score_layers(spec, fusion, shown):
        views.append((len(shown), all(view.pinned is not None for view in shown), not fusion.off))
        return inner(spec, fusion, shown)

    monkeypatch.setattr(step, "score_layers", score_layers)
    model = build("llama", num_hidden_layers=LAYERS)
    _with_regions(model, protecting("snapkv", "regions"), *prompt(28), kernels=True, count=STEPS)

    assert views == [(1, True, True)] * (1 + LAYERS) + [(LAYERS, True, True)] * 2  # first of all a trial


def test_a_prompt_beyond_the_budget_stays_in_kernels_as_well():
    """As many are held as are protected, which is said; what comes later is evicted."""
    model = build("llama", num_hidden_layers=LAYERS)
    policy = small("snapkv", 12, 4, protect={"sinks": 1, "recent": 3, "prompt": True})
    with pytest.warns(BudgetWarning, match="because they are protected"):
        _, _, slots = _with_regions(model, policy, *prompt(22), kernels=True, count=24)
    for layer in slots:
        for heads in layer:
            assert all(set(one) >= set(range(22)) and len(one) <= 22 + 3 + 3 for one in heads)


def _with_regions(model, policy, tokens, mask, expected=None, *, kernels, count):
    """What is generated, the report, and which positions each head of each layer and row holds."""
    plan = compile_policy(policy.spec, geometry_of(model.config), "cpu", torch.float32, kernels=kernels)
    assert bool(plan.fusion.off) != kernels
    with Attachment(plan, model) as attachment:
        regions = REGIONS if policy.spec.protect.regions else None
        cache = attachment.cache(regions=regions)
        options = {"count": count, "past_key_values": cache}
        if expected is None:
            found = generate(model, tokens, mask, **options)
        else:
            found = repeat(expected, slice(None), model, tokens, mask, **options)
        cache.check_integrity()
        return found, attachment.report(), held(cache)


def test_a_launch_that_is_refused_is_said_once(monkeypatch, caplog):
    """The references run instead, with the same tokens."""
    model = build("llama", num_hidden_layers=LAYERS)
    expected, _ = _generate(model, POLICIES["snapkv"], *prompt(28), kernels=False)

    calls, inner = [], step.score_layers

    def refuse(spec, fusion, views):
        """Once the plan has been made, for which kernels were tried."""
        calls.append(fusion)
        if fusion and sum(map(bool, calls)) > 1:
            raise UnsupportedInputError("no such luck")
        return inner(spec, fusion, views)

    monkeypatch.setattr(step, "score_layers", refuse)
    found, _ = _generate(model, POLICIES["snapkv"], *prompt(28), kernels=True)

    assert torch.equal(found.sequences, expected.sequences)
    assert [one.message for one in caplog.records].count(caplog.records[0].message) == 1
    assert "no such luck" in caplog.text


def _generate(model, policy: kvpolicy.Policy, tokens, mask, expected=None, *, kernels, count=STEPS):
    plan = compile_policy(policy.spec, geometry_of(model.config), "cpu", torch.float32, kernels=kernels)
    with Attachment(plan, model) as attachment:
        if expected is None:
            return generate(model, tokens, mask, count=count), attachment.report()
        return repeat(expected, slice(None), model, tokens, mask, count=count), attachment.report()
