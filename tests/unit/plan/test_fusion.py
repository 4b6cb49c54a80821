"""What a plan fuses, and what it says of the rest."""

import copy
import pickle

import attrs
import pytest
import torch

import kvpolicy
from kvpolicy.plan.compress import warm_up
from kvpolicy.plan.compress.fusion import fusion_of
from kvpolicy.plan.explain.compression_steps import steps_of
from kvpolicy.plan.explain.steps import REFERENCE, Shapes
from kvpolicy.plan.plan import compile_policy
from kvpolicy.spec.policy import Allocate, Weighted
from kvpolicy.stages import Geometry, HeadAllocator, Scorer, Tile
from tests.support.policies import small

GEOMETRY = Geometry((0, 1), 4, 2, 16)


@attrs.frozen
class Untiled(Scorer):
    """Has a reference only."""

    name = "untiled"

    def score(self, view):
        return view.keys.float().sum(-1)


@attrs.frozen
class Failing(Untiled):
    """Its tile cannot be had."""

    def tile(self):
        raise RuntimeError("out of tiles")


@attrs.frozen
class Wrong(Untiled):
    """Its tile is no Triton function."""

    def tile(self):
        return Tile(len)


@attrs.frozen
class Slow(HeadAllocator):
    """Looks at single scores."""

    name = "slow"
    reads_scores = True

    def allocate(self, request):
        return request.room


def plan_with(*scorers, kernels=True):
    spec = attrs.evolve(small("snapkv").spec, score=tuple(Weighted(one) for one in scorers))
    return compile_policy(spec, GEOMETRY, "cpu", torch.float32, kernels=kernels)


def test_reasons_are_the_plugins_own():
    """A scorer without a tile, one whose tile fails, an allocator that reads scores."""
    spec = attrs.evolve(small("snapkv").spec, score=(Weighted(Untiled()), Weighted(Failing())))
    spec = attrs.evolve(spec, allocate=Allocate(layers=spec.allocate.layers, heads=Slow()))
    fusion = fusion_of(spec, "")
    assert [term.reason for term in fusion.terms] == [
        "has no tile function",
        "its tile function failed: RuntimeError: out of tiles",
    ]
    assert fusion.allocate == "reads single scores"
    assert fusion_of(kvpolicy.load("keepkv").spec, "").merge == "changes the entries that it keeps"


def test_a_tile_that_does_not_run_leaves_the_others_fused():
    """Found out when the plan is made; the term runs its reference."""
    good = small("rkv").spec.score[1].scorer
    fusion = plan_with(good, Wrong()).fusion
    assert fusion.off == ""
    assert fusion.terms[0].tile is not None
    assert fusion.terms[1].tile is None
    assert fusion.terms[1].reason.startswith("its tile function does not run: ")


def test_a_trial_that_fails_leaves_attention_in_kernels(monkeypatch):
    """Compressions run the references, and the plan says why."""

    def fail(*_given):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(warm_up, "choose", fail)
    plan = plan_with(small("rkv").spec.score[0].scorer)
    assert plan.kernels
    assert plan.fusion.off == "RuntimeError: no such instruction"
    assert {step.implementation for step in steps_of(plan, Shapes(32, 16, 16, (32,)))} == {REFERENCE}


def test_without_a_gpu_nothing_is_fused():
    """The reason stands in the plan, and no tile function is asked for."""
    plan = plan_with(Failing(), kernels=None)
    assert not plan.kernels
    assert plan.fusion.off == plan.fusion.terms[0].reason == "no Triton on cpu"
    assert plan_with(Untiled(), kernels=False).fusion.off == "kernels are switched off"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])  # noqa: S301
def test_a_copy_of_a_plan_is_fused_as_well(copied):
    """Triton functions are not copied: the scorers are asked again."""
    plan = compile_policy(small("rkv").spec, GEOMETRY, "cpu", torch.float32, kernels=True)
    other = copied(plan).fusion
    assert [term.tile.function for term in other.terms] == [term.tile.function for term in plan.fusion.terms]
