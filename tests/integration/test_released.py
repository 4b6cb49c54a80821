"""Nothing of an attachment stays alive once it is over: neither its plan nor what a plan holds."""

import gc
import weakref

import pytest
import torch

import kvpolicy
from tests.support.models import build, generate, prompt
from tests.support.policies import small

GRAPH = {"plain": False, "graph": True}


def _used(one, policy, calibration, **how):
    """Weak references to all that was made, and nothing else."""
    with policy.attach(one, calibration=calibration, **how) as attachment:
        cache = attachment.cache()
        generate(one, *prompt(40, 33), count=12)
        with torch.no_grad():
            one(prompt(20)[0], past_key_values=cache)
        plan = attachment.plan
        bases = [form.keys.basis for form in plan.formats if hasattr(form.keys, "basis")]
        made = [plan, plan.footprint, plan.budgets, attachment, cache, *bases]
        return [weakref.ref(thing) for thing in made]


@pytest.mark.parametrize("graph", GRAPH.values(), ids=GRAPH)
@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "h2o"])
def test_a_plan_goes_with_its_attachment(name, graph):
    one = build()
    left = _used(one, small(name), None, graph=graph)
    gc.collect()
    assert [reference() for reference in left] == [None] * len(left)


@pytest.mark.parametrize("budget", ["100%", 16])
def test_a_latent_basis_goes_with_its_attachment(budget):
    one = build()
    store = {"use": "latent", "rank": 0.25, "value_group": 8, "batch": 2}
    policy = kvpolicy.load("sals25", store=store, read="all", budget=budget)
    calibration = policy.calibrate(one, prompt(64, 64)[0])
    left = _used(one, policy, calibration)
    assert len(left) == 5 + 3
    del calibration
    gc.collect()
    assert [reference() for reference in left] == [None] * len(left)


def test_what_is_remembered_is_bounded():
    budgets = small("pyramidkv").compile(build()).budgets
    first = budgets.per_layer(40)
    for seen in range(1, 10_000):
        budgets.ahead(seen)
    assert len(budgets._allocated) <= 4096
    assert budgets.per_layer(40) == first
