"""How decode splits segments among programs, and that the bytes stated for a plan are those addressed."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy_kernels import Column
from kvpolicy_kernels.attention.decode import decode
from kvpolicy_kernels.attention.kv_input import ExtraOutputs
from kvpolicy_kernels.attention.split_plan import DecodeShape, SplitPlan, traffic
from tests.kernels.attention.decoding import MIXED, call, channels, tokens
from tests.kernels.counting import counted
from tests.kernels.scenes import DEVICE


@pytest.mark.parametrize("listed", [0, 20])
@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("packing", ["none", "whole", "odd"])
@pytest.mark.parametrize("plan", [SplitPlan(16, 32, 3), SplitPlan(32, 96, 1)])
def test_bytes_planned_are_bytes_addressed(plan, packing, more, listed):
    unit = {"none": 0, "whole": 16, "odd": 5}[packing]
    keys, values = (channels(4, 64, unit), tokens(4, 64)) if unit else (None, None)
    one = call(MIXED, 64, torch.bfloat16, votes=more, listed=listed, keys=keys, values=values, seed=10)
    if listed:
        one = attrs.evolve(one, slots=one.slots.clamp(min=0))  # then every place of the list is read
        one = attrs.evolve(one, slots=one.slots.where(one.found.segments.lengths[:, None] > 0, -1))
        plan = attrs.evolve(plan, num_splits=-(-listed // plan.split_size))
    found, shown = counts(one, plan, more)
    read, lengths = attended(one)
    shape = DecodeShape(
        plan, 4, 64, 64, 2, listed or one.found.segments.longest, keys, values,
        votes=more, listed=8 if listed else 0, logits=more, mass=more,
    )  # fmt: skip
    planned = traffic(shape, lengths, read[0], read[1])
    for kind in ("read", "written"):
        wanted = {name: count for name, count in getattr(planned, kind).items() if name not in ("partial", "sums")}
        assert getattr(found, kind) == wanted
    assert shown == planned.launches


def counts(one, plan, more):
    """Traffic of all tensors that the caller knows, and how many launches there were."""
    count, group, dim = one.queries.shape
    longest = one.found.segments.longest if one.slots is None else one.slots.shape[1]
    out = torch.empty(count, group, dim, dtype=one.queries.dtype, device=DEVICE)
    logits = torch.empty(count, group, longest, device=DEVICE) if more else None
    mass = [torch.zeros(len(layer), group, device=DEVICE) for layer in one.found.columns["keys"].storages]
    column = Column(torch.tensor([layer.data_ptr() for layer in mass], device=DEVICE), torch.float32, group, (*mass,))
    named = {"queries": one.queries, "out": out}
    named |= {name: one.found.columns[name].storages for name in ("keys", "values")}
    for name in ("keys", "values"):
        tensor_input = getattr(one.kv, name)
        if tensor_input.packed is not None:
            named |= {f"{name}[{place}]": each.storages for place, each in enumerate(tensor_input.packed.columns)}
    if more:
        named |= {"votes": one.found.columns["votes"].storages, "logits": logits, "mass": (*mass,)}
    if one.slots is not None:
        named["slots"] = one.slots
    extra = ExtraOutputs(logits, column if more else None)
    with counted(named) as found:
        decode(one.queries, one.kv, 1.0, slots=one.slots, extra=extra, out=out, plan=plan)
    return found, 1 + bool(plan.num_splits > 1 or more)


def attended(one):
    """Packed keys and packed values attended to in each segment, and all entries."""
    lengths = one.found.segments.lengths.tolist()
    packed = []
    for tensor_input in (one.kv.keys, one.kv.values):
        how = tensor_input.packed
        sealed = [0] * len(lengths) if how is None else (how.groups * how.unpacking.group_size).tolist()
        if one.slots is not None:
            sealed = [int(((s >= 0) & (s < n)).sum()) for s, n in zip(one.slots, sealed, strict=True)]
        packed.append(sealed)
    return packed, lengths if one.slots is None else (one.slots >= 0).sum(1).tolist()


@given(
    st.integers(1, 2**18),
    st.integers(1, 4000),
    st.sampled_from([32, 256, 512, 1024]),
    st.booleans(),
    st.floats(0.01, 1),
)
def test_a_division_covers_every_entry(longest, count, row_bytes, packed, filled):
    entries = max(longest, int(longest * count * filled))
    found = SplitPlan.of(row_bytes, longest, entries, 132, packed=packed)
    assert found.split_size % found.block == 0
    assert (found.num_splits - 1) * found.split_size < longest <= found.num_splits * found.split_size
    assert found.num_splits <= 64
    share = max(entries / 264, longest / 64, 4 * found.block)  # two programs for each of 132 processors
    assert found.split_size <= share + found.block
