"""Nothing in a step waits for the device: on tensors without values, asking for one raises."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvpolicy.integrations.transformers.decode_graph.attend import attend_static
from kvpolicy.integrations.transformers.decode_graph.evict import evict
from kvpolicy.integrations.transformers.decode_graph.static_layer import StaticLayer
from kvpolicy.plan.plan import compile_policy
from kvpolicy.stages import Geometry, Rotary
from tests.support.policies import EVEN, small

GEOMETRY = Geometry((0, 1), 4, 2, 8)


class OnOneDevice(TorchDispatchMode):
    """Refuses operations on tensors of the host: they would be copied to a GPU, which cannot be captured."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        foreign = [one for one in tree_leaves((args, found)) if isinstance(one, torch.Tensor) and not one.is_meta]
        assert not foreign, f"{func} works on the host"
        return found


def step(policy, after=lambda out: None):
    clock = torch.zeros(3, dtype=torch.int32, device="meta")
    rotary = Rotary(torch.empty(4, device="meta"))
    plan = compile_policy(policy.spec, GEOMETRY, "cpu", torch.float32, rotary, kernels=False)
    layer = StaticLayer(plan, 0, 3, 16, clock)
    layer.output_projection = lambda: torch.empty(4, 8, 32, device="meta")
    keys, queries = (torch.randn(3, heads, 1, 8, device="meta") for heads in (2, 4))
    due = torch.zeros((1, 3), dtype=torch.bool, device="meta")
    budget, nan = (torch.zeros(size, dtype=torch.int64, device="meta") for size in ((1, 3), 2))
    with OnOneDevice():
        layer.update(keys, keys)
        out = attend_static(layer, queries, 0.3)
        evict([layer], due, budget, clock.long() + 1, nan)
        after(out)
    return out


@pytest.mark.parametrize("name", [*EVEN, "curkv", "leverage", "vase_dkv"])
def test_no_step_of_a_shipped_policy_waits(name):
    assert step(small(name)).shape == (3, 1, 4, 8)


@pytest.mark.parametrize("cross", [False, True])
def test_partitions_are_compared_without_waiting(cross):
    assert step(small("lagkv", score=[{"use": "lagkv", "sinks": 2, "lag": 4, "cross": cross}])).shape == (3, 1, 4, 8)


@pytest.mark.parametrize("pool", ["1d", "2d", "3d"])
def test_frames_are_compared_without_waiting(pool):
    score = [{"use": "frame_value_norm", "rows": 3, "columns": 1 if pool == "1d" else 3, "pool": pool}]
    select = {"use": "temporal_redundancy", "tokens_per_frame": 3, "recent_frames": 0.5}
    assert step(small("infinipot_v", score=score, select=select)).shape == (3, 1, 4, 8)


def test_waiting_is_noticed():
    with pytest.raises(RuntimeError, match="meta tensors"):
        step(small("snapkv"), lambda out: bool(out.any()))


def test_numbers_of_the_host_are_noticed():
    with pytest.raises(AssertionError, match="host"):
        step(small("snapkv"), lambda out: out.to("meta") + torch.tensor([1.0]).to("meta"))
