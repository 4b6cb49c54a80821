"""What is protected by its place in the request, where the entries of a view do not stand in order of position."""

import attrs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy.stages import Geometry, View
from tests.support.compressing import compress_one
from tests.support.examples import examples

BY_PLACE = ("none", "all", "heads", "prompt", "any")


def view_of(seed, slots, pinned):
    """Two rows whose heads hold different numbers of entries, in order."""
    numbers = torch.Generator().manual_seed(seed)
    shape = (2, 2, slots)
    positions = torch.randint(1, 4, shape, generator=numbers).cumsum(-1) - 1
    lengths = torch.randint(0, slots + 1, shape[:2], generator=numbers)
    positions[torch.arange(slots) >= lengths[..., None]] = -1
    held = positions >= 0
    label = {
        "none": torch.zeros_like(held),
        "all": held,
        "heads": held & (torch.rand(2, 2, 1, generator=numbers) < 0.5),
        "prompt": held & (positions < torch.randint(0, 40, (2, 1, 1), generator=numbers)),
        "any": held & (torch.rand(shape, generator=numbers) < 0.3),
    }[pinned]
    return View(
        keys=torch.randint(-9, 9, (*shape, 8), generator=numbers).float(),  # exact sums, in whatever order
        values=torch.randn(*shape, 8, generator=numbers),
        positions=positions.int(),
        geometry=Geometry((0,), 2, 2, 8),
        scaling=1.0,
        sinks=seed % 4,
        recent=seed % 5,
        pinned=label,
    )


def shuffled(view, seed):
    """The same entries in any order, empty slots last; and where each of them stood."""
    noise = torch.rand(view.positions.shape, generator=torch.Generator().manual_seed(seed))
    order = noise.masked_fill(~view.valid, 2.0).sort(-1).indices
    wide = order[..., None].expand(*order.shape, 8)
    other = attrs.evolve(
        view,
        keys=view.keys.gather(2, wide),
        values=view.values.gather(2, wide),
        positions=view.positions.gather(-1, order),
        pinned=view.pinned.gather(-1, order),
        in_order=False,
    )
    return other, order


@settings(max_examples=examples(25))
@given(
    st.integers(0, 2**20),
    st.integers(1, 40),
    st.sampled_from(BY_PLACE),
    st.sampled_from(["key_norm", "recency"]),
    st.sampled_from(["uniform", "adaptive"]),
    st.lists(st.integers(1, 40), min_size=2, max_size=2),
)
def test_the_same_entries_stay_in_whatever_slots_they_are(seed, slots, pinned, scorer, heads, budget):
    """With held more than the budget, rows of other lengths, and ties, which go to the earlier position."""
    spec = kvpolicy.load("snapkv", score=[{"use": scorer}], allocate={"heads": heads}, protect={"recent": 0}).spec
    view = view_of(seed, slots, pinned)
    other, order = shuffled(view, seed + 1)
    kept, found = (compress_one(spec, one, budget) for one in (view, other))
    assert found.lengths == kept.lengths
    for row in range(2):
        for head in range(2):
            slots_of = found.kept[row, head][found.kept[row, head] >= 0]
            expected = kept.kept[row, head][kept.kept[row, head] >= 0]
            assert sorted(order[row, head][slots_of].tolist()) == expected.tolist()
            assert set(expected.tolist()) >= set(view.protected[row, head].nonzero().flatten().tolist())
