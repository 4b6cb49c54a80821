"""What an attached policy adds to a decode step, counted: Python calls and operators, a layer and a step."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import kvpolicy
from tests.support.made_once import made_once
from tests.support.models import build, prompt

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "explanation" / "performance.md"
ROW = re.compile(r"^\| (\w+(?:, every token)?) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", re.MULTILINE)
STATED = {name: tuple(map(int, numbers)) for name, *numbers in ROW.findall(PAGE.read_text("utf-8"))}
STEPS = 6
PROMPT = 64


class Operators(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls_of(step):
    """Python functions that are called, without those of C."""
    calls = []
    sys.setprofile(lambda _frame, event, _argument: calls.append(event) if event == "call" else None)
    try:
        step()
    finally:
        sys.setprofile(None)
    return len(calls)


def operators_of(step):
    with Operators() as counted:
        step()
    return counted.count


def counts(one, cache):
    """Calls and operators of a decode step, on average."""
    token = torch.tensor([[5]])

    def step():
        one(token, past_key_values=cache)

    with torch.no_grad():
        one(prompt(PROMPT)[0], past_key_values=cache)
        step()
        return [sum(count(step) for _ in range(STEPS)) / STEPS for count in (calls_of, operators_of)]


def added(policy, layers):
    one = build(num_hidden_layers=layers, head_dim=32)
    plain = counts(one, DynamicCache(config=one.config))
    with policy.attach(one) as attachment:
        ours = counts(one, attachment.cache())
    return [own - theirs for own, theirs in zip(ours, plain, strict=True)]


def policy_of(name):
    """One that evicted once, after the prompt, and not in the steps that are counted; or in each of them."""
    if name == "full":
        return kvpolicy.load(name)
    if name == "kivi4":  # of the prompt keys and values are packed, and of the tokens that are counted none
        return kvpolicy.load(name, store={"use": "kivi", "bits": 4, "residual": 32, "batch": 16})
    name, _, each = name.partition(", ")
    return kvpolicy.load(name, budget=12, protect={"recent": 4}, compress={"every": 1 if each else 64})


def per_layer_and_step(name):
    """Calls and operators of a layer, and those of a step beside its layers."""
    few, many = added(policy_of(name), 2), added(policy_of(name), 4)
    layer = [(more - less) / 2 for more, less in zip(many, few, strict=True)]
    fixed = [less - 2 * each for less, each in zip(few, layer, strict=True)]
    return *layer, *fixed


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Counted in a process of its own: what other tests have loaded into this one makes torch call more."""
    return made_once(tmp_path_factory, "added-calls", counted)


def counted(_folder):
    code = (
        "import json; from tests.integration.test_added_calls import STATED, per_layer_and_step as counted\n"
        "print(json.dumps({name: counted(name) for name in STATED}))"
    )
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603
    return json.loads(told.stdout)


@pytest.mark.parametrize("name", STATED)
def test_no_more_is_added_than_the_page_says(name, measured):
    """Nor much less: then the page is out of date. Pythons after 3.11 call fewer functions."""
    for count, stated in zip(measured[name], STATED[name], strict=True):
        assert 0.6 * stated - 2 <= count <= stated


def test_the_page_has_a_table():
    assert {"full", "snapkv", "rkv", "adakv", "h2o", "keepkv", "kivi4", "keepkv, every token"} <= STATED.keys()
