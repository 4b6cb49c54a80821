"""Far into a sequence, where float32 no longer holds every integer, everything is as at its start."""

import attrs
import pytest
import torch

from kvpolicy.attention.blockwise import visible
from kvpolicy.plan.plan import compile_policy
from kvpolicy.stages import Geometry
from tests.property.test_faulty_merges import MERGERS, kept_of, merged, parts, view_for
from tests.support.compressing import chosen, compress_layers
from tests.support.policies import NAMES, small
from tests.unit.plan.test_faults import DIM, GROUP, HEADS, SLOTS, seen

FAR = 2**25 + 1


def far(view):
    """The same entries and queries, `FAR` tokens later."""
    positions = view.positions.where(view.positions < 0, view.positions + FAR).int()
    asked = None if view.queries is None else (view.window_positions + FAR).int()
    return attrs.evolve(view, positions=positions, query_positions=asked)


def spec_of(name):
    return small(name, protect={"sinks": 0, "recent": 2}).spec


def given(name):
    """A view with all that a shipped policy looks at."""
    view, random = seen(window=32), torch.Generator().manual_seed(4)
    mass = torch.rand(2, HEADS, GROUP, SLOTS, generator=random)
    state = {"score[0].history": torch.full((2, HEADS, SLOTS), -torch.inf)} if name == "gkv" else {}
    projection = torch.randn(HEADS * GROUP, DIM, 5, generator=random)
    return attrs.evolve(view, attention=mass, slot_state=state, output_projection=projection)


@pytest.mark.parametrize("name", [*(name for name in NAMES if name != "vase"), "curkv"])
def test_the_same_entries_are_kept(name):
    """All but vase, which draws anew at every position."""
    view = given(name)
    near = chosen(spec_of(name), view, [9, 11])
    assert torch.equal(chosen(spec_of(name), far(view), [9, 11]).kept, near.kept)


def test_kernels_keep_the_same_entries():
    plan = compile_policy(
        spec_of("streaming_llm"), Geometry((0,), HEADS * GROUP, HEADS, DIM), "cpu", torch.float32, kernels=True
    )
    assert not plan.fusion.off
    view = given("streaming_llm")
    near, later = (compress_layers(plan, [one], [[9, 11]])[0].kept for one in (view, far(view)))
    assert torch.equal(near, later)
    assert near[0, 0].tolist()[:9] == list(range(SLOTS - 9, SLOTS))


@pytest.mark.parametrize("name", [name for name in MERGERS if name != "cam"])  # whose draws depend on the position
def test_the_same_entries_are_merged_into_the_same(name):
    merger = MERGERS[name]
    view = attrs.evolve(view_for(merger), sinks=0)
    kept = kept_of(view)
    pairs = zip(parts(merged(merger, view, kept)), parts(merged(merger, far(view), kept)), strict=True)
    for near, later in pairs:
        assert all(torch.equal(later[name], one) for name, one in near.items())


def test_a_query_sees_what_is_not_later_to_the_token():
    positions = torch.arange(FAR, FAR + 6, dtype=torch.int32)[None, None]
    assert visible(positions, positions[0])[0, 0].tolist() == torch.ones(6, 6).tril().bool().tolist()
