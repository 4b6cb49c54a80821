"""What is kept moves, bit for bit; nothing else changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy_kernels.compact import compact_holes, compact_ordered
from kvpolicy_kernels.compact.compact import compact, traffic
from tests.kernels.compact.compacting import EIGHT, EXTRA, check, expected, random_kept, snapshot
from tests.kernels.counting import counted
from tests.kernels.scenes import DEVICE, scene
from tests.support.examples import examples

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, EIGHT]
NUMBERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.fixture(params=["as shipped", "many chunks"])
def chunks(request, monkeypatch):
    """As shipped, a short segment is one chunk and there are many programs; or many chunks and few programs."""
    if request.param == "many chunks":
        monkeypatch.setattr(compact_ordered, "_BYTES_IN_FLIGHT", 1024)
        monkeypatch.setattr(compact_ordered, "_MAX_ROWS", 32)
        monkeypatch.setattr(compact_ordered, "_BUSY", 0)
        monkeypatch.setattr(compact_holes, "_ROWS", 16)
        monkeypatch.setattr(compact_holes, "_POSITIONS", 32)
        monkeypatch.setattr(compact_holes, "_MAX_PARTS", 2)
    return request.param


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 129, 501])
def test_kept_entries_move_to_the_front(length, dense, ordered, chunks):
    lengths = torch.tensor([[[length]], [[length // 2]]])
    random = torch.Generator().manual_seed(length)
    for share in (0.1, 0.5, 0.95):
        capacity = length + 3 if dense else None
        found = scene(lengths, 32, torch.bfloat16, capacity=capacity, seed=length)
        kept = random_kept(lengths.flatten(), share, random)
        moved = check(found, kept, ordered=ordered)
        count, held = int((kept >= 0).sum()), int(lengths.sum())
        assert moved <= (count if ordered else min(count, held - count))


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("dim", [1, 3, 59, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_and_width(dtype, dim, ordered):
    lengths = torch.tensor([[[37, 5]]])
    found = scene(lengths, dim, dtype, seed=dim)
    check(found, random_kept(lengths.flatten(), 0.6, torch.Generator().manual_seed(dim)), ordered=ordered)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_any_dtype_of_state(dtype, ordered):
    lengths = torch.tensor([[[40, 33]]])
    extra = {f"state {width}": ((width,), dtype) for width in (1, 2, 3, 7)}
    found = scene(lengths, 16, torch.float32, extra=extra, capacity=41)
    check(found, random_kept(lengths.flatten(), 0.6, torch.Generator().manual_seed(3)), ordered=ordered)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("which", ["all", "none", "first", "last", "even", "odd", "half behind"])
def test_special_choices(which, ordered, chunks):
    length = 96
    slots = torch.arange(length)
    chosen = {
        "all": slots,
        "none": slots[:0],
        "first": slots[:1],
        "last": slots[-1:],
        "even": slots[::2],
        "odd": slots[1::2],
        "half behind": slots[length // 2 :],
    }[which]
    for spare in (0, 5):
        kept = torch.full((2, len(chosen) + spare), -1, dtype=torch.int32)
        kept[:, : len(chosen)] = chosen
        found = scene(torch.full((2, 1, 1), length), 8, torch.float16, seed=spare)
        check(found, kept.to(DEVICE), ordered=ordered)


@settings(max_examples=examples(16))
@given(
    lengths=st.lists(st.integers(0, 90), min_size=2, max_size=2),
    share=st.floats(0, 1),
    dim=st.sampled_from([4, 5, 16, 30]),
    dtype=st.sampled_from(DTYPES),
    dense=st.booleans(),
    ordered=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_segments(lengths, share, dim, dtype, dense, ordered, seed):
    table = torch.tensor(lengths).view(2, 1, 1)
    found = scene(table, dim, dtype, capacity=max(lengths) + 1 if dense else None, extra=EXTRA, seed=seed)
    kept = random_kept(table.flatten(), share, torch.Generator().manual_seed(seed))
    check(found, kept, ordered=ordered)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("length", [5, 65, 200])
def test_traffic_is_what_kernels_address(length, ordered, chunks):
    lengths = torch.tensor([[[length, length // 2]], [[0, 3]]])
    found = scene(lengths, 40, torch.bfloat16, extra=EXTRA)
    kept = random_kept(lengths.flatten(), 0.6, torch.Generator().manual_seed(length))
    _, moved = expected(snapshot(found.columns), found.segments, kept, ordered)
    count, held, out = int((kept >= 0).sum()), int(lengths.sum()), torch.zeros(4, dtype=torch.int32, device=DEVICE)
    named = {name: column.storages for name, column in found.columns.items()}
    rest = [column for name, column in found.columns.items() if name != "positions"]
    with counted({**named, "kept": kept, "lengths": out}) as seen:
        compact(found.segments, kept, rest, ordered=ordered, positions=found.columns["positions"], out=out)
    numbers = {"held": held, "kept": count, "moved": moved}
    said = traffic(found.segments, found.columns, kept.shape[1], ordered=ordered, **numbers)
    assert seen.read == {name: count for name, count in said.read.items() if count}
    assert seen.written == {name: count for name, count in said.written.items() if count}
    assert said.launches == 1


@pytest.mark.parametrize("ordered", [True, False])
def test_a_repeated_launch_gives_the_same_bits(ordered):
    lengths = torch.tensor([[[90, 77]]])
    kept = random_kept(lengths.flatten(), 0.5, torch.Generator().manual_seed(5))
    results = []
    for _ in range(20 if DEVICE == "cpu" else 250):
        found = scene(lengths, 16, torch.bfloat16)
        columns = [found.columns["keys"], found.columns["values"]]
        compact(found.segments, kept, columns, ordered=ordered, positions=found.columns["positions"])
        results.append(snapshot(found.columns))
    for result in results[1:]:
        assert all(map(torch.equal, result["keys"], results[0]["keys"]))


def test_positions_are_moved_once_even_if_they_are_among_the_columns():
    found = scene(torch.tensor([[[60]]]), 8, torch.float32)
    kept = random_kept(torch.tensor([60]), 0.5, torch.Generator().manual_seed(2))
    after, _ = expected(snapshot(found.columns), found.segments, kept, ordered=False)
    compact(found.segments, kept, list(found.columns.values()), ordered=False, positions=found.columns["positions"])
    for name, storages in snapshot(found.columns).items():
        assert all(map(torch.equal, storages, after[name])), name


def test_columns_without_positions():
    for ordered in (True, False):
        found = scene(torch.tensor([[[60]]]), 8, torch.float32)
        kept = random_kept(torch.tensor([60]), 0.5, torch.Generator().manual_seed(2))
        before = snapshot(found.columns)
        after, _ = expected(before, found.segments, kept, ordered)
        compact(found.segments, kept, [found.columns["keys"]], ordered=ordered)
        now = snapshot(found.columns)
        assert all(map(torch.equal, now["keys"], after["keys"]))
        assert all(map(torch.equal, now["positions"], before["positions"]))
