"""What the layers of one step share."""

import pytest
import torch

from kvpolicy.cache import scheduler
from kvpolicy.cache.integrity import Integrity
from kvpolicy.cache.scheduler import CompressionScheduler
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer
from kvpolicy.integrations.transformers.models.support import geometry_of
from kvpolicy.plan.compress.step import compress
from kvpolicy.plan.plan import compile_policy
from tests.support.driving import feed, plan_of, random_entries, worth_plan
from tests.support.models import build
from tests.support.policies import small


def test_positions_are_those_of_the_tokens_that_arrive():
    """Made once for all layers of a step, and anew for other tokens or rows, or behind other pads."""
    shared, cpu = CompressionScheduler(worth_plan(), waits=False), torch.device("cpu")
    first = shared.step([3, 0], 5, 2, cpu)
    assert first.positions.tolist() == [[3, 4], [0, 1]]
    assert first.positions.dtype == torch.int32
    assert first.after == [5, 2]
    assert shared.step([3, 0], 5, 2, cpu) is first
    assert shared.step([3, 0], 5, 1, cpu).positions.tolist() == [[3], [0]]
    assert shared.step([3, 0], 6, 1, cpu).seq_len == 6
    assert shared.step([4], 5, 1, cpu).positions.tolist() == [[4]]


def test_layers_that_wait_together_are_compressed_with_those_of_their_own_scaling(monkeypatch):
    """A kernel takes one scaling for all layers of a launch; logits of window votes depend on it."""
    launches = []

    def recorded(spec, fusion, groups, budgets, tokens, **named):
        launches.append([(view().layer, view().scaling) for group in groups for view in group])
        return compress(spec, fusion, groups, budgets, tokens, **named)

    monkeypatch.setattr(scheduler, "compress", recorded)
    plan = plan_of(small("snapkv", budget=6, every=2, protect={"recent": 2}), layers=4)
    shared, integrity = CompressionScheduler(plan, waits=True), Integrity(range(4))
    layers = [PolicyLayer(plan, ordinal, shared, integrity) for ordinal in range(4)]
    alone = [PolicyLayer(plan, ordinal) for ordinal in range(4)]
    for group in (alone, layers):
        launches.clear()
        generator = torch.Generator().manual_seed(0)
        for count in (6, 1, 1):
            for layer, scaling in zip(group, (0.5, 2.0, 0.5, 2.0), strict=True):
                feed(layer, *random_entries(generator, 2, count), scaling=scaling)
    assert launches == [[(0, 0.5), (2, 0.5)], [(1, 2.0), (3, 2.0)]]
    for layer, single in zip(layers, alone, strict=True):
        assert torch.equal(
            layer.storage.keys.residual.padded("keys", [0, 1]), single.storage.keys.residual.padded("keys", [0, 1])
        )


@pytest.mark.parametrize(
    ("policy", "kernels", "sizes"),
    [
        (small("snapkv"), True, [16]),
        (small("snapkv"), False, [16]),
        (small("adakv"), True, [2] * 8),  # copies, of which kernels take two layers in a launch
        (small("adakv"), False, [1] * 16),
        (small("snapkv", store={"use": "kivi", "bits": 4, "group": 4, "residual": 4, "batch": 4}), True, [1] * 16),
    ],
)
def test_no_more_than_an_eighth_of_the_layers_is_shown_as_copies_at_once(policy, kernels, sizes):
    one = build(num_hidden_layers=16)
    plan = compile_policy(policy.spec, geometry_of(one.config), "cpu", torch.float32, kernels=kernels)
    shared = CompressionScheduler(plan, waits=True)
    layers = [PolicyLayer(plan, ordinal, shared) for ordinal in range(16)]
    for layer in layers:
        layer.scaling = 0.25
    groups = shared._shown_together(layers)

    assert [len(group) for group in groups] == sizes
    assert [layer for group in groups for layer in group] == layers
