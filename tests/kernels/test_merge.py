"""Who is nearest, sums over groups, and mergers that use both."""

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy.stages.slots import indices_of
from kvpolicy_kernels import Column, UnsupportedInputError, group_sums, nearest
from kvpolicy_kernels.group_sums import Groups, sum_numbers, sum_rows
from kvpolicy_plugins import merging, merging_kernels
from kvpolicy_plugins.mergers.d2o import D2O
from kvpolicy_plugins.mergers.keepkv import KeepKV
from kvpolicy_plugins.mergers.kvmerger import KVMerger
from kvpolicy_plugins.mergers.pivot import Pivot
from kvpolicy_plugins.mergers.tome import ToMe
from kvpolicy_plugins.mergers.weighted import Weighted
from kvpolicy_plugins.mergers.window_fit import WindowFit
from tests.kernels.accuracy import assert_twice_as_good
from tests.kernels.counting import counted
from tests.kernels.outputs import Guarded
from tests.kernels.references.merging import cosines, logarithms_of_sums, number_sums, weighted_sums
from tests.kernels.scenes import DEVICE, scene
from tests.views import fresh_state, view_of

SIZES = [1, 2, 63, 64, 65, 127, 129, 300]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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


@settings(max_examples=40)
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


def groups_for(length, count, random, segments=2):
    return torch.randint(-1, count, (segments, length), generator=random).to(DEVICE)


@pytest.mark.parametrize("count", [1, 5, 70])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 129])
def test_weighted_sums_of_rows(length, dtype, count):
    dim = {1: 128, 5: 59, 70: 16}[count]
    found = scene(torch.full((2, 1, 1), length), dim, dtype, capacity=length + count % 2, seed=length)
    segments = attrs.evolve(found.segments, longest=length)
    random = torch.Generator().manual_seed(length + count)
    targets, weights = groups_for(length, count, random), torch.randn(2, length, generator=random).to(DEVICE)
    out = Guarded((2, count, dim), torch.float32, DEVICE)
    sum_rows(segments, found.columns["keys"], weights, Groups.of(targets, count), out=out.tensor)
    out.check()
    for place, rows in enumerate(found.lists("keys")):
        exact = weighted_sums(rows.cpu(), weights[place].cpu(), targets[place].tolist(), count)
        used = targets[place].cpu().clamp(min=0)[:, None].expand(-1, dim)
        parts = (weights[place].cpu() * (targets[place].cpu() >= 0))[:, None] * rows.cpu().float()
        assert_twice_as_good(out.tensor[place].cpu(), torch.zeros(count, dim).scatter_add(0, used, parts), exact)


@pytest.mark.parametrize("logarithms", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("count", [2, 7, 130])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 129])
def test_sums_of_numbers(length, count, rows, logarithms):
    random = torch.Generator().manual_seed(length + count)
    targets = groups_for(length, count, random)
    values = 30 * torch.randn(2, rows, length, generator=random)
    if logarithms:
        values[torch.rand(values.shape, generator=random) < 0.2] = -torch.inf
    out = Guarded((2, rows, count), torch.float32, DEVICE)
    sum_numbers(values.to(DEVICE), Groups.of(targets, count), logarithms=logarithms, out=out.tensor)
    out.check()
    reference = logarithms_of_sums if logarithms else number_sums
    by_torch = merging.logsumexp_by_target if logarithms else merging.count_by_target
    for segment in range(2):
        to = targets[segment].cpu()
        for row in range(rows):
            mine = values[segment, row]
            exact = reference(mine, to.tolist(), count)
            nothing = -torch.inf if logarithms else 0.0
            same = by_torch(mine.masked_fill(to < 0, nothing)[None, None], to.clamp(min=0)[None, None], count)
            assert_twice_as_good(out.tensor[segment, row].cpu(), same[0, 0], exact)


def test_infinite_and_missing_logarithms():
    values = torch.tensor([[[torch.inf, 1, -torch.inf, -torch.inf, torch.nan, 900, 900]]], device=DEVICE)
    groups = Groups.of(torch.tensor([[0, 0, 1, 1, 2, 3, 3]], device=DEVICE), 5)
    found = sum_numbers(values, groups, logarithms=True)[0, 0].tolist()
    assert found[:2] == [torch.inf, -torch.inf]
    assert found[2] != found[2]
    assert found[3] == pytest.approx(900.6931)
    assert found[4] == -torch.inf


def test_sums_are_repeatable():
    random = torch.Generator().manual_seed(0)
    found = scene(torch.tensor([[[60]]]), 64, torch.bfloat16)
    targets, weights = groups_for(60, 9, random, 1), torch.randn(1, 60, generator=random).to(DEVICE)
    column = found.columns["values"]
    first, *others = (sum_rows(found.segments, column, weights, Groups.of(targets, 9)) for _ in range(20))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 64, 90])
def test_traffic_of_the_search(length, dtype):
    lengths = torch.tensor([[[length, length // 2]]])
    found = scene(lengths, 40, dtype)
    kept, evicted = division(lengths.flatten(), length, torch.Generator().manual_seed(length))
    out = torch.empty(2, length, device=DEVICE), torch.empty(2, length, dtype=torch.int64, device=DEVICE)
    keys = found.columns["keys"]
    named = {"keys": keys.storages, "kept": kept, "evicted": evicted, "similarity": out[0], "place": out[1]}
    with counted({name: one for name, one in named.items() if not hasattr(one, "numel") or one.numel()}) as seen:
        nearest.nearest(found.segments, keys, kept, evicted, out=out)
    counts = (kept >= 0).sum(-1).tolist(), evicted.sum(-1).tolist()
    said = nearest.traffic(found.segments, keys, kept.shape[1], *counts)
    assert seen.read == {name: count for name, count in said.read.items() if count}
    assert seen.written == said.written
    assert said.launches == 2


@pytest.mark.parametrize("length", [1, 64, 90])
def test_traffic_of_sums(length):
    random = torch.Generator().manual_seed(length)
    found = scene(torch.full((1, 1, 2), length), 40, torch.bfloat16)
    targets, weights = groups_for(length, 20, random), torch.randn(2, length, generator=random).to(DEVICE)
    groups, keys, out = Groups.of(targets, 20), found.columns["keys"], torch.empty(2, 20, 40, device=DEVICE)
    members = int((targets >= 0).sum())
    tables = {"order": groups.order, "bounds": groups.bounds}
    with counted({"vectors": keys.storages, "weights": weights, **tables, "out": out}) as seen:
        sum_rows(found.segments, keys, weights, groups, out=out)
    said = group_sums.rows_traffic(keys, 2, 20, members)
    assert (seen.read, seen.written) == (said.read, said.written)
    values = torch.randn(2, 3, length, generator=random).to(DEVICE)
    for logarithms in (True, False):
        sums = torch.empty(2, 3, 20, device=DEVICE)
        with counted({"values": values, **tables, "out": sums}) as seen:
            sum_numbers(values, groups, logarithms=logarithms, out=sums)
        said = group_sums.numbers_traffic(2, 3, 20, members, logarithms=logarithms)
        assert (seen.read, seen.written) == (said.read, said.written)


def test_what_kernels_cannot_do_is_refused():
    found = scene(torch.tensor([[[20, 10]]]), 8, torch.float32)
    segments, keys = found.segments, found.columns["keys"]
    kept = torch.zeros(2, 3, dtype=torch.int32, device=DEVICE)
    evicted, weights = torch.ones(2, 20, dtype=torch.bool, device=DEVICE), torch.ones(2, 20, device=DEVICE)
    groups = Groups.of(torch.zeros(2, 20, dtype=torch.int64, device=DEVICE), 3)
    wide = Column(keys.addresses, torch.float32, 257, keys.storages)
    double = Column(keys.addresses, torch.float64, 8, keys.storages)
    for arguments in (
        (segments, wide, kept, evicted),
        (segments, double, kept, evicted),
        (segments, keys, kept.long(), evicted),
        (segments, keys, kept, evicted[:, :7]),
        (segments, keys, kept, weights),
    ):
        with pytest.raises(UnsupportedInputError):
            nearest.nearest(*arguments)
    for arguments in (
        (segments, wide, weights, groups),
        (segments, double, weights, groups),
        (segments, keys, weights.double(), groups),
        (segments, keys, weights[:, :7], groups),
        (segments, keys, weights, Groups.of(torch.zeros(2, 19, dtype=torch.int64, device=DEVICE), 3)),
    ):
        with pytest.raises(UnsupportedInputError):
            sum_rows(*arguments)
    for values in (weights, weights.double()[:, None], weights[:, None, :7]):
        with pytest.raises(UnsupportedInputError):
            sum_numbers(values, groups, logarithms=True)


@pytest.fixture
def launched(monkeypatch):
    """Functions of `merging` use the kernels, interpreted or not; the names of those that did."""
    names = []

    def noting(name):
        function = getattr(merging_kernels, name)

        def call(*given):
            result = function(*given)
            names.append(name)
            return result

        return call

    for name in ("nearest", "sum_by_target", "count_by_target", "logsumexp_by_target"):
        monkeypatch.setattr(merging_kernels, name, noting(name))
    monkeypatch.setattr(merging, "runs_kernels", lambda _device: True)
    return names


def random_view(dtype, seed=0):
    """Rows and heads of different length, one of them empty, and what is kept of them."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([[50, 43], [30, 0]])
    keys, values = (torch.randn(2, 2, 50, 16, generator=random).to(DEVICE, dtype) for _ in range(2))
    queries = torch.randn(2, 4, 8, 16, generator=random).to(DEVICE, dtype)
    there = torch.arange(50) < lengths[..., None]
    positions = torch.arange(50).where(there, -1).to(DEVICE)
    kept = indices_of(there & (torch.rand(there.shape, generator=random) < 0.4)).to(DEVICE)
    return view_of(keys, values=values, queries=queries, positions=positions), kept


@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_of_merging_give_the_same_by_kernels(dtype, launched, monkeypatch):
    view, kept = random_view(dtype)
    evicted = merging.evicted_of(view, kept)
    weights = torch.rand(evicted.shape, device=DEVICE).masked_fill(~evicted, 0.0)
    values = torch.randn(2, 2, 3, 4, 50, device=DEVICE).masked_fill(~evicted[:, :, None, None], -torch.inf)
    target = torch.randint(0, kept.shape[-1], evicted.shape, device=DEVICE)
    calls = [
        lambda: merging.nearest(view.keys, kept, evicted),
        lambda: (merging.sum_by_target(weights, view.keys, target, kept.shape[-1]),),
        lambda: (merging.count_by_target(weights, target, kept.shape[-1]),),
        lambda: (merging.logsumexp_by_target(values, target, kept.shape[-1]),),
    ]
    by_kernels = [call() for call in calls]
    assert launched == ["nearest", "sum_by_target", "count_by_target", "logsumexp_by_target"]
    monkeypatch.setattr(merging, "runs_kernels", lambda _device: False)
    for found, call in zip(by_kernels, calls, strict=True):
        torch.testing.assert_close(found, call(), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    "merger",
    [Weighted(), Pivot(), D2O(), D2O(normalize="softmax"), ToMe(), KVMerger(), KeepKV(threshold=0.1), WindowFit()],
    ids=lambda merger: type(merger).__name__,
)
def test_mergers_give_the_same_by_kernels(merger, launched, monkeypatch):
    view, kept = random_view(torch.float32, seed=3)
    slot_state = fresh_state(merger, view)
    row_state = {one.name: torch.full((2,), one.fill, device=DEVICE) for one in merger.row_state()}
    view = attrs.evolve(
        view, row_state=row_state, slot_state={name: one.to(DEVICE) for name, one in slot_state.items()}
    )
    found = merger.merge(view, kept)
    assert launched
    monkeypatch.setattr(merging, "runs_kernels", lambda _device: False)
    exact = merger.merge(view, kept)
    assert found.changed.any()
    assert torch.equal(found.changed, exact.changed)
    for name in ("keys", "values", "log_votes"):
        one, other = getattr(found, name), getattr(exact, name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_what_kernels_cannot_do_torch_does(launched):
    view, kept = random_view(torch.float64)
    evicted = merging.evicted_of(view, kept)
    similarity, _ = merging.nearest(view.keys, kept, evicted)
    assert similarity.dtype == torch.float64
    weights = evicted.double()
    assert merging.count_by_target(weights, kept.new_zeros(evicted.shape), 3).dtype == torch.float64
    assert merging.sum_by_target(weights, view.keys, kept.new_zeros(evicted.shape), 3).dtype == torch.float64
    assert merging.logsumexp_by_target(weights, kept.new_zeros(evicted.shape), 3).dtype == torch.float64
    assert not launched


@pytest.mark.parametrize(("slots", "count"), [(0, 3), (3, 0), (0, 0)])
def test_nobody_and_nowhere_to_go(slots, count, launched, monkeypatch):
    weights, vectors = torch.rand(1, 2, slots, device=DEVICE), torch.rand(1, 2, slots, 5, device=DEVICE)
    target = torch.zeros(1, 2, slots, dtype=torch.int64, device=DEVICE)
    nobody, kept = (
        torch.zeros(1, 2, slots, dtype=torch.bool, device=DEVICE),
        target.new_full((1, 2, min(slots, count)), -1),
    )

    def run():
        sums = merging.sum_by_target(weights, vectors, target, count), merging.count_by_target(weights, target, count)
        logarithms = merging.logsumexp_by_target(weights[:, :, None], target, count)
        return *sums, logarithms, *merging.nearest(vectors, kept, nobody)

    found = run()
    assert len(launched) == 4
    monkeypatch.setattr(merging, "runs_kernels", lambda _device: False)
    for one, other in zip(found, run(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
