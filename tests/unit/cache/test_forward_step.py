"""What layers share of a forward is what each of them would find by itself."""

import pytest
import torch

from kvpolicy.cache.forward_step import ForwardStep
from kvpolicy.cache.trigger import entries_allowed
from tests.support.driving import plan_of, worth_plan
from tests.support.policies import small

CPU = torch.device("cpu")
LAYERS = 5
POLICIES = {
    "the same in all layers": small("snapkv"),
    "a pyramid": small("pyramidkv"),
    "a share of the tokens": small("snapkv", budget="40%"),
    "prompts only": small("snapkv", every="never"),
    "decode steps only": small("snapkv", compress={"prefill": False, "every": 3}),
}


@pytest.mark.parametrize("decoding", [True, False])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_the_least_that_is_allowed_is_that_of_the_row_that_may_hold_least(policy, decoding):
    plan = plan_of(policy, layers=LAYERS)
    for tokens in ([30], [7, 60, 60, 31]):
        step = ForwardStep.of(plan, tokens, 61, 1, CPU)
        expected = [
            min(entries_allowed(plan, layer, count + 1, decoding=decoding) for count in tokens)
            for layer in range(LAYERS)
        ]
        assert list(step.least_allowed(decoding=decoding)) == expected


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_storage_may_grow_as_far_as_a_layer_alone_would_let_it(policy):
    plan = plan_of(policy, layers=LAYERS)
    step = ForwardStep.of(plan, [30], 31, 1, CPU)
    assert list(step.limits) == [plan.capacity(layer, 31) for layer in range(LAYERS)]


def test_pads_have_no_position_and_do_not_count():
    step = ForwardStep.of(worth_plan(), [3, 0], 6, 3, CPU)
    valid = torch.tensor([[True, True, True], [False, True, False]])
    placed = step.with_pads(valid, [3, 1])
    assert placed.positions.tolist() == [[3, 4, 5], [-1, 0, -1]]
    assert placed.positions.dtype == torch.int32
    assert (placed.before, placed.after, placed.seq_len) == ([3, 0], [6, 1], 6)
    assert placed.most_tokens == 6
    assert torch.equal(placed.by_head, placed.positions[:, None].expand(placed.by_head.shape))
    assert step.with_pads(valid, [3, 1]) is placed
    other = torch.tensor([[True, True, False], [True, True, True]])
    assert step.with_pads(other, [2, 3]).positions.tolist() == [[3, 4, -1], [0, 1, 2]]
    assert step.after == [6, 3]
