"""Decoding with kernels gives what decoding without gives."""

import pytest
import torch

import kvpolicy
from kvpolicy.attention import attend as attention
from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.integrations.transformers.models.rotary import rotary_of
from kvpolicy.integrations.transformers.models.support import geometry_of
from kvpolicy.plan.plan import compile_policy
from tests.support.alone import repeat
from tests.support.decisions import Decisions
from tests.support.models import build, generate, prompt
from tests.support.policies import small

LAYERS, STEPS = 2, 4
KIVI = {"use": "kivi", "bits": 4, "group": 8, "residual": 8, "batch": 4}
POLICIES = {
    "rkv": small("rkv", 20, 4, protect={"recent": 8}),
    "adakv": small("adakv", 20, 4, protect={"recent": 8}),
    "keepkv": small("keepkv", 16, 2, protect={"sinks": 2, "recent": 6}),
    "h2o": small("h2o", 16, 2, protect={"recent": 6}),
    "kivi4": kvpolicy.load("kivi4", store=KIVI),
    "rkv_int4": small("rkv", 24, 4, protect={"recent": 8}, store=KIVI),
    "fp8": kvpolicy.load("kivi4", store={"use": "fp8", "residual": 3, "batch": 2}),
    "rotation": kvpolicy.load("kivi4", store={"use": "rotation", "bits": 3, "residual": 3, "batch": 4}),
    "turboquant": small("adakv", 20, 4, protect={"recent": 8}, store={"use": "turboquant", "residual": 3, "batch": 2}),
    "tada": kvpolicy.load("tada", store={"use": "tada", "bits": 4, "residual": 8, "batch": 4}),
    "quest": kvpolicy.load("quest", read={"use": "pages", "page": 4, "budget": 12, "dense_first": 1}),
}


BATCHED = ("adakv", "kivi4", "turboquant")


@pytest.mark.parametrize(
    ("name", "rows"), [*((name, (28,)) for name in POLICIES), *((name, (25, 14)) for name in BATCHED)]
)
def test_decoding_with_kernels(name, rows, monkeypatch):
    model = build("llama", num_hidden_layers=LAYERS)
    tokens, mask = prompt(*rows)
    decisions = Decisions()
    with decisions.watched():
        expected = _generate(model, name, tokens, mask, kernels=False)
    served = []
    inner = attention.attend_in_kernel

    def attend_in_kernel(*given, **named):
        out = inner(*given, **named)
        served.append(1)
        return out

    monkeypatch.setattr(attention, "attend_in_kernel", attend_in_kernel)
    with decisions.followed():
        _generate(model, name, tokens, mask, expected, kernels=True)
    # Of the tokens, the first comes from the prompt; in quest's first layer everything is read by the stock attention.
    assert len(served) == (STEPS - 1) * (LAYERS - (name == "quest"))


def _generate(model, name, tokens, mask, expected=None, *, kernels):
    geometry, rotary = geometry_of(model.config), rotary_of(model)
    plan = compile_policy(POLICIES[name].spec, geometry, "cpu", torch.float32, rotary, kernels=kernels)
    assert plan.kernels is kernels
    with Attachment(plan, model):
        if expected is None:
            return generate(model, tokens, mask, count=STEPS)
        return repeat(expected, slice(None), model, tokens, mask, count=STEPS)
