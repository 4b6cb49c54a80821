"""`kvpolicy plan` states the bytes that kernels address; those of the entries are counted in the interpreter."""

import pytest
import torch

from kvpolicy.plan.explain import explain
from kvpolicy.plan.explain.steps import Step
from kvpolicy.plan.plan import compile_policy
from kvpolicy.stages import Geometry, View
from kvpolicy_kernels import Column, Segments, Traffic
from kvpolicy_kernels.compact.compact import compact, compact_to
from tests.kernels.counting import counted
from tests.support.compressing import chosen_together
from tests.support.policies import small

BUDGET, EVERY, LENGTH = 96, 32, 500
GEOMETRY = Geometry((0,), 8, 2, 32)
# No two keys look alike at a threshold of 1: the search goes through everything, which is what the plan states.
NEVER_ALIKE = {"use": "redundancy", "threshold": 1, "forgive": 1, "empty_row": "slot0", "weight": -0.9}
ATTENTION = {"use": "attention", "queries": 8, "pool": {"kind": "max", "size": 7}, "normalise": "max"}
OF_CANDIDATES = {**ATTENTION, "softmax": "candidates", "normalise": "standard"}
POLICIES = {
    "snapkv": small("snapkv", BUDGET, EVERY, protect={"recent": 8}),
    "rkv": small("rkv", BUDGET, EVERY, protect={"recent": 8}, score=[ATTENTION, NEVER_ALIKE]),
    "adakv": small("adakv", BUDGET, EVERY, protect={"recent": 8}),
    "sinks": small("snapkv", BUDGET, EVERY, protect={"sinks": 4, "recent": 8}),
    "streaming_llm": small("streaming_llm", BUDGET, EVERY, protect={"sinks": 4, "recent": 8}),
    "h2o": small("h2o", BUDGET, EVERY, protect={"recent": 8}),
    "regions": small("snapkv", BUDGET, EVERY, protect={"recent": 8, "regions": ["system"]}),
    "regions of heads": small("adakv", BUDGET, EVERY, protect={"sinks": 4, "recent": 8, "regions": ["system"]}),
    "candidates": small("snapkv", BUDGET, EVERY, protect={"recent": 8, "prompt": True}, score=[OF_CANDIDATES]),
    "values": small("snapkv", BUDGET, EVERY, protect={"recent": 8}, score=[ATTENTION, {"use": "value_norm"}]),
}
NAMES = ("keys", "values", "positions", "attention", "pinned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_planned_bytes_are_those_that_kernels_address(name, dtype, monkeypatch):
    plan = compile_policy(POLICIES[name].spec, GEOMETRY, "cpu", dtype, kernels=True)
    planned = _planned(plan, monkeypatch)
    view = _view(plan, BUDGET + EVERY)
    tensors = {one: getattr(view, one) for one in NAMES if getattr(view, one) is not None}
    assert ("pinned" in tensors) == plan.spec.protect.by_place

    with counted(tensors) as choosing:
        chosen_together(plan.spec, plan.fusion, [view], [[BUDGET]])

    compacted = [planned.pop("compact")] if "compact" in planned else []
    expected = Traffic.total(planned.values())
    if name == "rkv":  # of all pairs that may forgive one is missing in each head: the first entry has no other
        pair = GEOMETRY.kv_heads * GEOMETRY.head_dim * dtype.itemsize
        expected = Traffic({**expected.read, "keys": expected.read["keys"] - pair}, expected.written)
    assert _named(choosing) == _named(expected)
    for traffic in compacted:
        assert _named(_moved(view, tensors, ragged=plan.ragged)) == _named(traffic)


def _planned(plan, monkeypatch):
    """The traffic of every fused step of the explanation, by stage; scores together."""
    found = {}
    inner = Step.fused

    def note(stage, plugin, traffic, reason=""):
        found[stage] = Traffic.total([found[stage], traffic]) if stage in found else traffic
        return inner(stage, plugin, traffic, reason)

    monkeypatch.setattr(Step, "fused", note)
    explanation = explain(plan, LENGTH)
    assert not explanation.unfused
    return found


def _named(traffic):
    """Reads and writes of the entries; what a kernel keeps in between is counted in its own test."""
    return [{one: counts[one] for one in NAMES if counts.get(one)} for counts in (traffic.read, traffic.written)]


def _view(plan, slots):
    numbers = torch.Generator().manual_seed(1)
    shape = (1, GEOMETRY.kv_heads, slots)
    window, dim = plan.needs.queries, GEOMETRY.head_dim
    mass = torch.rand(*shape, GEOMETRY.group, generator=numbers) if plan.needs.attention else None
    sinks, recent = plan.budgets.protected(slots)
    return View(
        keys=torch.randn(*shape, dim, generator=numbers).to(plan.dtype),
        values=torch.randn(*shape, dim, generator=numbers).to(plan.dtype),
        positions=torch.arange(slots, dtype=torch.int32).expand(shape).contiguous(),
        geometry=GEOMETRY,
        scaling=dim**-0.5,
        sinks=sinks,
        recent=recent,
        queries=torch.randn(1, GEOMETRY.query_heads, window, dim, generator=numbers).to(plan.dtype) if window else None,
        attention=None if mass is None else mass.transpose(-1, -2),
        pinned=(torch.arange(slots) % 5 == 3).expand(shape).contiguous() if plan.spec.protect.by_place else None,
    )


def _moved(view, tensors, *, ragged):
    """The traffic of compaction; the first entry leaves, so that all that stay move: the most that can be."""
    kept = torch.arange(1, BUDGET + 1, dtype=torch.int32).expand(GEOMETRY.kv_heads, -1).contiguous()
    tensors = {name: tensor for name, tensor in tensors.items() if name != "pinned"}  # no column: nothing to move
    segments, columns = Segments.of([view.keys], view.lengths[None]), _columns(tensors)
    if not ragged:
        positions = columns.pop("positions")
        with counted(tensors) as moving:
            compact(segments, kept, list(columns.values()), ordered=True, positions=positions)
        return moving
    others = {name: tensor.clone() for name, tensor in tensors.items()}
    targets = list(_columns(others).values())
    with counted(tensors) as reading, counted(others) as writing:
        compact_to(segments, kept, list(columns.values()), segments, targets)
    assert not any(_named(reading)[1].values())
    return Traffic(reading.read, writing.written)


def _columns(tensors):
    flat = {name: one.transpose(-1, -2) if name == "attention" else one for name, one in tensors.items()}
    return {name: Column.of([one]) for name, one in flat.items()}
