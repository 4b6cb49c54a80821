"""Mergers and their functions give by kernels what they give by torch, and kernels refuse what they cannot do."""

import attrs
import pytest
import torch

from kvpolicy.stages.slots import indices_of
from kvpolicy_kernels import Column, UnsupportedInputError
from kvpolicy_kernels.merge import nearest
from kvpolicy_kernels.merge.group_sums import Groups, sum_numbers, sum_rows
from kvpolicy_plugins.mergers.d2o import D2O
from kvpolicy_plugins.mergers.keepkv import KeepKV
from kvpolicy_plugins.mergers.kvmerger import KVMerger
from kvpolicy_plugins.mergers.pivot import Pivot
from kvpolicy_plugins.mergers.shared import merge_groups, merge_groups_kernels
from kvpolicy_plugins.mergers.tome import ToMe
from kvpolicy_plugins.mergers.weighted import Weighted
from kvpolicy_plugins.mergers.window_fit import WindowFit
from tests.kernels.scenes import DEVICE, DTYPES, scene
from tests.support.views import fresh_state, view_of


@pytest.fixture
def launched(monkeypatch):
    """Functions of `merging` use the kernels, interpreted or not; the names of those that did."""
    names = []

    def noting(name):
        function = getattr(merge_groups_kernels, name)

        def call(*given):
            result = function(*given)
            names.append(name)
            return result

        return call

    for name in ("nearest", "sum_by_target", "count_by_target", "logsumexp_by_target"):
        monkeypatch.setattr(merge_groups_kernels, name, noting(name))
    monkeypatch.setattr(merge_groups, "runs_kernels", lambda _device: True)
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
    evicted = merge_groups.evicted_of(view, kept)
    weights = torch.rand(evicted.shape, device=DEVICE).masked_fill(~evicted, 0.0)
    values = torch.randn(2, 2, 3, 4, 50, device=DEVICE).masked_fill(~evicted[:, :, None, None], -torch.inf)
    target = torch.randint(0, kept.shape[-1], evicted.shape, device=DEVICE)
    calls = [
        lambda: merge_groups.nearest(view.keys, kept, evicted),
        lambda: (merge_groups.sum_by_target(weights, view.keys, target, kept.shape[-1]),),
        lambda: (merge_groups.count_by_target(weights, target, kept.shape[-1]),),
        lambda: (merge_groups.logsumexp_by_target(values, target, kept.shape[-1]),),
    ]
    by_kernels = [call() for call in calls]
    assert launched == ["nearest", "sum_by_target", "count_by_target", "logsumexp_by_target"]
    monkeypatch.setattr(merge_groups, "runs_kernels", lambda _device: False)
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
    monkeypatch.setattr(merge_groups, "runs_kernels", lambda _device: False)
    exact = merger.merge(view, kept)
    assert found.changed.any()
    assert torch.equal(found.changed, exact.changed)
    for name in ("keys", "values", "log_votes"):
        one, other = getattr(found, name), getattr(exact, name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


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


def test_what_kernels_cannot_do_torch_does(launched):
    view, kept = random_view(torch.float64)
    evicted = merge_groups.evicted_of(view, kept)
    similarity, _ = merge_groups.nearest(view.keys, kept, evicted)
    assert similarity.dtype == torch.float64
    weights = evicted.double()
    assert merge_groups.count_by_target(weights, kept.new_zeros(evicted.shape), 3).dtype == torch.float64
    assert merge_groups.sum_by_target(weights, view.keys, kept.new_zeros(evicted.shape), 3).dtype == torch.float64
    assert merge_groups.logsumexp_by_target(weights, kept.new_zeros(evicted.shape), 3).dtype == torch.float64
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
        sums = (
            merge_groups.sum_by_target(weights, vectors, target, count),
            merge_groups.count_by_target(weights, target, count),
        )
        logarithms = merge_groups.logsumexp_by_target(weights[:, :, None], target, count)
        return *sums, logarithms, *merge_groups.nearest(vectors, kept, nobody)

    found = run()
    assert len(launched) == 4
    monkeypatch.setattr(merge_groups, "runs_kernels", lambda _device: False)
    for one, other in zip(found, run(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
