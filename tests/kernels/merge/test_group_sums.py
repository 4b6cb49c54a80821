"""Sums of rows, numbers and logarithms over groups, against loops in float64."""

import attrs
import pytest
import torch

from kvpolicy_kernels.merge import group_sums
from kvpolicy_kernels.merge.group_sums import Groups, sum_numbers, sum_rows
from kvpolicy_plugins.mergers.shared import merge_groups
from tests.kernels.accuracy import assert_twice_as_good
from tests.kernels.counting import counted
from tests.kernels.outputs import Guarded
from tests.kernels.references.merging import logarithms_of_sums, number_sums, weighted_sums
from tests.kernels.scenes import DEVICE, DTYPES, scene


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
    by_torch = merge_groups.logsumexp_by_target if logarithms else merge_groups.count_by_target
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
