"""A policy compiled for a geometry."""

import sys

import pytest
import torch

from kvpolicy.errors import UnsupportedModelError
from kvpolicy.plan.forward_observers import ATTENTION
from kvpolicy.plan.plan import LOG_VOTES, POSITIONS, compile_policy
from kvpolicy.stages import Geometry
from tests.support.policies import NAMES, RAGGED, small

GEOMETRY = Geometry((0, 1, 2), 8, 2, 16)


def plan_of(name, **overrides):
    return compile_policy(small(name, **overrides).spec, GEOMETRY, "cpu", torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_only_what_a_scorer_asks_for_is_observed_and_held(name):
    plan = plan_of(name)
    assert (ATTENTION in plan.columns) == plan.needs.attention == (name == "h2o")
    assert (plan.needs.queries > 0) == (name not in ("h2o", "keydiff", "streaming_llm"))
    assert LOG_VOTES not in plan.columns
    assert plan.columns[POSITIONS].bytes_per_slot == 4
    assert plan.ragged == (name in RAGGED)
    states = [column for column in plan.columns if column.startswith("score[")]
    assert len(states) == (name == "gkv")


@pytest.mark.parametrize("name", [*NAMES, "curkv", "lagkv", "vase_dkv", "keepkv", "quest", "infinipot_v"])
def test_holes_are_filled_where_nobody_minds_the_order(name):
    """A scorer minds in rkv, blend and lagkv; heads of other lengths, changed entries and pages are laid out anew."""
    filling = {
        *("snapkv", "pyramidkv", "h2o", "tova", "streaming_llm", "keydiff", "curkv", "vase_dkv", "chunkkv", "vase"),
        *("criticalkv", "kvcrush", "infinipot_v"),
    }
    assert plan_of(name).fills_holes == (name in filling)


def test_holes_are_not_filled_while_packing_nor_in_prompts_nor_by_kernels_that_select():
    assert not plan_of("snapkv", store={"use": "fp8", "batch": 2}).fills_holes
    assert not plan_of("snapkv", compress={"every": "never"}).fills_holes
    spec = small("snapkv").spec
    assert not compile_policy(spec, GEOMETRY, "cpu", torch.bfloat16, kernels=True).fills_holes


def test_an_entry_costs_its_keys_values_and_position():
    assert plan_of("snapkv").footprint.entry_bytes == 2 * 16 * 2 + 4
    assert plan_of("h2o").footprint.entry_bytes == 2 * 16 * 2 + 4 + 4 * 4


@pytest.mark.parametrize(("seen", "capacity"), [(1, 2 + 4), (5, 10 + 4), (6, 12 + 4), (10**6, 12 + 4)])
def test_capacity_is_the_budget_and_the_slack_and_looks_ahead_below_it(seen, capacity):
    assert plan_of("snapkv", budget=12, every=4).capacity(0, seen) == capacity


def test_capacity_follows_a_share_closely():
    assert plan_of("snapkv", budget="50%", every=4).capacity(0, 100) == 50 + 4


def test_a_policy_for_prompts_only_bounds_no_capacity():
    assert plan_of("snapkv", every="never").capacity(0, 100) == sys.maxsize


@pytest.mark.parametrize("device", ["meta", "nowhere", "mps"])
def test_an_unusable_device_is_refused(device):
    with pytest.raises(UnsupportedModelError, match="device"):
        compile_policy(small("snapkv").spec, GEOMETRY, device, torch.float32)


def test_an_unusable_dtype_is_refused():
    with pytest.raises(UnsupportedModelError, match="dtype"):
        compile_policy(small("snapkv").spec, GEOMETRY, "cpu", torch.int8)
