"""Decode attention against float64, segment by segment."""

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy_kernels.attention.split_plan import SplitPlan
from tests.kernels.attention.decoding import LAYERS, MIXED, SMALL, assert_right, call, channels, float8, run, tokens
from tests.kernels.scenes import DEVICE, DTYPES
from tests.support.examples import examples


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capacity", [None, 512], ids=["ragged", "dense"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 129, 500])
def test_lengths(length, capacity, dtype):
    lengths = torch.tensor([[[length, max(1, length - 3)]]])
    assert_right(call(lengths, 64, dtype, capacity=capacity, seed=length))


@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("dim", [59, 64, 80, 128])
def test_head_dims_and_groups(dim, group):
    dtype = DTYPES[(dim + group) % 3]
    assert_right(call(LAYERS, dim, dtype, group, seed=dim + group), SplitPlan(16, 32, 2))


@pytest.mark.parametrize("plan", [None, SMALL], ids=["default", "split"])
@pytest.mark.parametrize("listed", [0, 40], ids=["", "listed"])
@pytest.mark.parametrize("positions", [False, True], ids=["all", "positions"])
@pytest.mark.parametrize("votes", [False, True], ids=["plain", "votes"])
@pytest.mark.parametrize("logits", [False, True], ids=["", "logits"])
@pytest.mark.parametrize("mass", [False, True], ids=["", "mass"])
def test_everything_that_can_be_added(logits, mass, votes, positions, listed, plan):
    seed = 8 * logits + 4 * mass + 2 * votes + positions + 100 * listed
    one = call(MIXED, 32, torch.float32, votes=votes, positions=positions, listed=listed, seed=seed)
    assert_right(one, plan, logits=logits, mass=mass)


@pytest.mark.timeout(600)  # interpreted, on a busy machine
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=examples(5))
def test_any_call(dtype, data):
    draw = data.draw
    layers, rows, heads = (draw(st.integers(1, 2)) for _ in range(3))
    count = layers * rows * heads
    lengths = draw(st.lists(st.integers(0, 50), min_size=count, max_size=count))
    dim = draw(st.sampled_from([8, 20, 32]))
    tensor_input = st.sampled_from(["plain", "fp8", "quantised"])
    keys, values = (draw(tensor_input) for _ in range(2))
    bits = draw(st.sampled_from([2, 4, 8]))
    one = call(
        torch.tensor(lengths).view(layers, rows, heads),
        dim,
        dtype,
        draw(st.integers(1, 9)),
        capacity=draw(st.sampled_from([None, 50])),
        votes=draw(st.booleans()),
        positions=draw(st.booleans()),
        listed=draw(st.sampled_from([0, 0, 1, 17])),
        keys={"plain": None, "fp8": float8(dim), "quantised": channels(bits, dim, draw(st.integers(1, 20)))}[keys],
        values={"plain": None, "fp8": float8(dim), "quantised": tokens(bits, dim, 4)}[values],
        seed=draw(st.integers(0, 2**20)),
    )
    block = draw(st.sampled_from([16, 32]))
    item = block * draw(st.integers(1, 3))
    longest = one.found.segments.longest if one.slots is None else one.slots.shape[1]
    plan = SplitPlan(block, item, -(-longest // item))
    assert_right(one, plan, logits=draw(st.booleans()), mass=draw(st.booleans()))


def test_equal_logits_share_equally():
    one = call(torch.tensor([[[48]]]), 32, torch.float32, seed=6)
    one.keys[0].copy_(one.keys[0][:1].expand(48, -1).clone())
    _, _, mass = run(one, SMALL, mass=True)
    assert torch.allclose(mass[0][:48] - 0.5, torch.tensor(1 / 48, device=DEVICE), atol=1e-6)


def test_calls_repeat_bit_for_bit():
    one = call(MIXED, 64, torch.bfloat16, votes=True, seed=7)
    first = run(one, SMALL, logits=True)
    again = run(one, SMALL, logits=True)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_int32_lists_are_as_good():
    one = call(MIXED, 64, torch.float32, listed=9, seed=8)
    narrow = attrs.evolve(one, slots=one.slots.int())
    assert torch.equal(run(one, SMALL)[0], run(narrow, SMALL)[0])


def test_holes_in_a_list_are_nothing():
    one = call(MIXED, 64, torch.float32, listed=20, seed=9)
    holes = one.slots.clone()
    holes[:, ::3] = -1
    assert_right(attrs.evolve(one, slots=holes), logits=True, mass=True)
