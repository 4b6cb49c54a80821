"""Which kept entry is nearest to each evicted one, against cosines in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy_kernels.merge import nearest
from tests.kernels.accuracy import assert_twice_as_good
from tests.kernels.counting import counted
from tests.kernels.outputs import Guarded
from tests.kernels.references.merging import cosines
from tests.kernels.scenes import DEVICE, DTYPES, scene
from tests.support.examples import examples

SIZES = [1, 2, 63, 64, 65, 127, 129, 300]


def division(lengths, longest, random, share=0.4):
    """Kept slots [P, N] with holes among them, and evicted ones [P, T]; some slots are neither."""
    draws = torch.rand(len(lengths), longest, generator=random)
    held = torch.arange(longest) < lengths[:, None]
    rows = [(row & mine).nonzero().flatten().tolist() for row, mine in zip(draws < share, held, strict=True)]
    width = max(map(len, rows))
    kept = torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32).reshape(len(rows), width)
    kept[torch.rand(kept.shape, generator=random) < 0.1] = -1
    return kept.to(DEVICE), ((draws >= share + 0.1) & held).to(DEVICE)


def found_by(segments, keys, kept, evicted):
    shape = (segments.count, segments.longest)
    out = Guarded(shape, torch.float32, DEVICE), Guarded(shape, torch.int64, DEVICE)
    returned = nearest.nearest(segments, keys, kept, evicted, out=(out[0].tensor, out[1].tensor))
    for one, guarded in zip(returned, out, strict=True):
        assert one is guarded.tensor
        guarded.check()
    return returned


def check_nearest(found, kept, evicted):
    similarity, place = found_by(found.segments, found.columns["keys"], kept, evicted)
    assert torch.equal(similarity > -torch.inf, evicted & (kept >= 0).any(-1, keepdim=True))
    assert not place[similarity == -torch.inf].any()
    for segment, keys in enumerate(found.lists("keys")):
        slots = evicted[segment].nonzero().flatten().tolist()
        if not slots or not kept.shape[1]:
            continue
        exact = cosines(keys.cpu(), kept[segment].tolist(), slots)
        best = exact.max(-1).values
        unit = torch.nn.functional.normalize(keys.float().cpu(), dim=-1, eps=1e-6)
        same_dtype = (unit[slots] @ unit[kept[segment].clamp(min=0).long().cpu()].T).masked_fill(
            kept[segment].cpu() < 0, -torch.inf
        )
        mine = similarity[segment, slots].cpu()
        assert_twice_as_good(mine, same_dtype.max(-1).values, best)
        taken = exact.gather(-1, place[segment, slots].cpu()[:, None])[:, 0]
        assert ((best == -torch.inf) | (taken >= best - 2e-6)).all(), "another one is nearer"


@pytest.mark.parametrize("dim", [59, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", SIZES)
def test_the_nearest_kept_entry(length, dtype, dim):
    lengths = torch.tensor([[[length, length // 2]]])
    found = scene(lengths, dim, dtype, capacity=length + 1 if dim == 59 else None, seed=length)
    random = torch.Generator().manual_seed(length)
    kept, evicted = division(lengths.flatten(), found.segments.longest, random)
    check_nearest(found, kept, evicted)


@settings(max_examples=examples(20))
@given(
    lengths=st.lists(st.integers(0, 70), min_size=3, max_size=3),
    dim=st.sampled_from([1, 3, 16, 80, 128]),
    dtype=st.sampled_from(DTYPES),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    dense=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_the_nearest_in_any_segments(lengths, dim, dtype, share, dense, seed):
    table = torch.tensor(lengths).view(3, 1, 1)
    found = scene(table, dim, dtype, capacity=max(lengths) + 2 if dense else None, seed=seed)
    kept, evicted = division(table.flatten(), found.segments.longest, torch.Generator().manual_seed(seed), share)
    check_nearest(found, kept, evicted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [40, 65, 129, 200])
def test_the_lowest_of_equals_is_nearest(length, dtype):
    found = scene(torch.tensor([[[length]]]), 16, dtype, seed=length)
    keys = found.columns["keys"].storages[0]
    random = torch.Generator().manual_seed(length)
    signs = torch.randint(0, 2, (length, 16), generator=random) * 2 - 1
    signs[:, 4:] = 1  # sixteen directions of norm 4: similarities are exact, and most of them equal
    keys[:length] = signs.to(dtype)
    kept, evicted = division(torch.tensor([length]), length, random)
    similarity, place = found_by(found.segments, found.columns["keys"], kept, evicted)
    for slot in evicted[0].nonzero().flatten().tolist():
        exact = (signs[slot] @ signs[kept[0].clamp(min=0).long().cpu()].T / 16.0).masked_fill(kept[0].cpu() < 0, -9)
        assert similarity[0, slot] == exact.max()
        assert place[0, slot] == int((exact == exact.max()).nonzero()[0])


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's opinion of an infinite product
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_keys_that_are_not_finite_are_near_nobody(bad, dtype):
    found = scene(torch.tensor([[[80, 80]]]), 32, dtype)
    keys = found.columns["keys"].storages[0]
    kept = torch.arange(0, 80, 2, dtype=torch.int32, device=DEVICE).expand(2, 40).contiguous()
    evicted = (torch.arange(80, device=DEVICE) % 2 == 1).expand(2, 80).contiguous()
    clean = found_by(found.segments, found.columns["keys"], kept, evicted)
    keys[4, 3], keys[7, 0] = bad, bad
    similarity, place = found_by(found.segments, found.columns["keys"], kept, evicted)
    assert similarity[0, 7] == -torch.inf
    assert (place[0] != 2)[evicted[0]].all()
    others = evicted & (clean[1] != 2)
    others[0, 7] = False
    assert torch.equal(similarity[others], clean[0][others])
    assert torch.equal(place[others], clean[1][others])


def test_tiny_and_zero_keys():
    found = scene(torch.tensor([[[6]]]), 16, torch.float32)
    keys = found.columns["keys"].storages[0]
    keys[:6] = torch.tensor([1.0, 0, 1e-9, 1e-40, -0.0, -1])[:, None]
    kept = torch.tensor([[0, 5]], dtype=torch.int32, device=DEVICE)
    evicted = torch.tensor([[False, True, True, True, True, False]], device=DEVICE)
    similarity, place = found_by(found.segments, found.columns["keys"], kept, evicted)
    assert similarity[0, [1, 4]].tolist() == [0, 0]
    assert similarity[0, 2].item() == pytest.approx(4e-9 / 1e-6, rel=1e-5)
    assert place[0].tolist() == [0] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 64, 90])
def test_traffic_of_the_search(length, dtype):
    lengths = torch.tensor([[[length, length // 2]]])
    found = scene(lengths, 40, dtype)
    kept, evicted = division(lengths.flatten(), length, torch.Generator().manual_seed(length))
    out = torch.empty(2, length, device=DEVICE), torch.empty(2, length, dtype=torch.int64, device=DEVICE)
    keys = found.columns["keys"]
    named = {"keys": keys.storages, "kept": kept, "evicted": evicted, "similarity": out[0], "index": out[1]}
    with counted({name: one for name, one in named.items() if not hasattr(one, "numel") or one.numel()}) as seen:
        nearest.nearest(found.segments, keys, kept, evicted, out=out)
    counts = (kept >= 0).sum(-1).tolist(), evicted.sum(-1).tolist()
    said = nearest.traffic(found.segments, keys, kept.shape[1], *counts)
    assert seen.read == {name: count for name, count in said.read.items() if count}
    assert seen.written == said.written
    assert said.launches == 2
