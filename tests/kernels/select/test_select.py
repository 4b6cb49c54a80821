"""Radix select, against sorted lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy_kernels.select.select import counts_of_best, counts_traffic, select, traffic
from kvpolicy_plugins.allocators.adaptive import Adaptive
from kvpolicy_plugins.selectors.topk import TopK
from tests.kernels.counting import counted
from tests.kernels.scenes import DEVICE, scene
from tests.kernels.select.selecting import KINDS, budgets, check_counts, check_select, scores_of
from tests.support.allocating import counts_of
from tests.support.examples import examples
from tests.support.selecting import selected_by

SMALL = [0, 1, 2, 63, 64, 65, 127, 129]


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (4, 0), (0, 8), (5, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_select_lengths(kind, sinks, recent):
    found = scene(torch.tensor(SMALL).reshape(1, 2, 4), 1, torch.float32, seed=recent)
    scores = scores_of(kind, found, seed=sinks)
    check_select(found, scores, budgets(len(SMALL), 60).roll(sinks + recent), sinks=sinks, recent=recent)


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (4, 0), (0, 8), (5, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_count_lengths(kind, sinks, recent):
    found = scene(torch.tensor(SMALL).reshape(1, 2, 4), 1, torch.float32, seed=recent)
    scores = scores_of(kind, found, seed=sinks)
    for totals in ([0, 1000], [130, 17]):
        check_counts(found, scores, torch.tensor(totals, device=DEVICE), sinks=sinks, recent=recent)


@pytest.mark.parametrize("count", [0, 37, 200, 499, 500, 501])
@pytest.mark.parametrize("kind", KINDS)
def test_select_five_hundred(kind, count):
    found = scene(torch.tensor([[[500]]]), 1, torch.float32)
    check_select(found, scores_of(kind, found, count), torch.tensor([count], device=DEVICE))


@pytest.mark.parametrize("total", [0, 1, 77, 700, 999, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_counts_of_a_thousand(kind, total):
    found = scene(torch.tensor([[[500, 500]]]), 1, torch.float32)
    check_counts(found, scores_of(kind, found, total), torch.tensor([total], device=DEVICE))


LAYOUTS = [
    torch.tensor([[[37, 1, 64]]]),
    torch.tensor([[[0, 20]], [[7, 0]]]),
    torch.tensor([[[66, 9], [130, 0]], [[2, 33], [1, 65]], [[0, 0], [0, 0]]]),
]


@pytest.mark.parametrize("counts", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("capacity", [None, 300])
@pytest.mark.parametrize("lengths", LAYOUTS, ids=["heads", "layers", "all"])
def test_ragged_and_dense_segments_of_several_layers(lengths, capacity, counts):
    found = scene(lengths, 1, torch.float32, capacity=capacity, seed=5)
    scores = scores_of("few values", found, 5)
    check_select(found, scores, budgets(lengths.numel(), 30, counts), sinks=3, recent=2)
    check_counts(found, scores, budgets(lengths[..., 0].numel(), 50, counts), sinks=3, recent=2)


@pytest.mark.parametrize(("kind", "sinks", "recent"), [("few values", 0, 0), ("special", 6, 32)])
@pytest.mark.parametrize("lengths", [[9000, 4096], [17000, 8191]], ids=str)
def test_many_chunks(lengths, kind, sinks, recent):
    """Up to 16384 entries one program walks a segment; beyond, and for joint counts, several share it."""
    found = scene(torch.tensor(lengths).reshape(1, 1, 2), 1, torch.float32, seed=1)
    scores = scores_of(kind, found, 1)
    counts = torch.tensor([lengths[0] // 2, 4000], device=DEVICE)
    check_select(found, scores, counts, sinks=sinks, recent=recent)
    check_counts(found, scores, torch.tensor([sum(lengths) // 3], device=DEVICE), sinks=sinks, recent=recent)


@pytest.mark.timeout(600)
@settings(max_examples=examples(12))
@given(
    lengths=st.lists(st.integers(0, 100), min_size=4, max_size=4),
    shape=st.sampled_from([(1, 1, 4), (2, 1, 2), (1, 4, 1), (1, 2, 2)]),
    kind=st.sampled_from(KINDS),
    counts=st.lists(st.integers(-1, 160), min_size=4, max_size=4),
    sinks=st.integers(0, 12),
    recent=st.integers(0, 12),
    capacity=st.sampled_from([None, 150]),
    seed=st.integers(0, 2**20),
)
def test_any_segments(lengths, shape, kind, counts, sinks, recent, capacity, seed):
    found = scene(torch.tensor(lengths).reshape(shape), 1, torch.float32, capacity=capacity, seed=seed)
    scores = scores_of(kind, found, seed)
    check_select(found, scores, torch.tensor(counts, device=DEVICE), sinks=sinks, recent=recent)
    totals = torch.tensor(counts[: shape[0] * shape[1]], device=DEVICE) * 2
    check_counts(found, scores, totals, sinks=sinks, recent=recent)


@pytest.mark.parametrize("seed", range(10))
def test_as_the_plugins(seed):
    """The selector and the allocator of the same names choose the same."""
    found = scene(torch.tensor([[[90, 90, 90], [90, 90, 90]]]), 1, torch.float32, capacity=90, seed=seed)
    scores = scores_of(KINDS[seed % 4], found, seed)
    positions, slots = torch.stack(found.lists("positions")).reshape(2, 3, 90), torch.arange(90, device=DEVICE)
    candidates = (positions >= 6) & (slots < 80)
    totals = torch.tensor([100, 37], device=DEVICE)
    usual = {"positions": found.columns["positions"], "sinks": 6, "recent": 10}
    counts = counts_of_best(scores, found.segments, totals, **usual)
    shaped = scores.reshape(2, 3, 90)
    assert counts.reshape(2, 3).tolist() == counts_of(Adaptive(floor=0.0), shaped, candidates, totals).tolist()
    chosen = selected_by(TopK(), shaped, candidates, counts.reshape(2, 3).long()) | ~candidates
    kept = select(scores, found.segments, counts, 90, **usual)
    for row, flags in zip(kept, chosen.reshape(6, 90), strict=True):
        assert row[row >= 0].tolist() == flags.nonzero().flatten().tolist()


def test_a_row_of_nan_leaves_other_rows_alone():
    found = scene(torch.tensor([[[70, 70], [70, 70]]]), 1, torch.float32)
    clean = scores_of("normal", found, 1)
    dirty = clean.clone()
    dirty[0] = torch.nan
    counts, totals = torch.full((4,), 20, device=DEVICE), torch.tensor([40, 40], device=DEVICE)
    before, after = (check_select(found, scores, counts) for scores in (clean, dirty))
    assert torch.equal(before[1:], after[1:])
    assert after[0].tolist() == list(range(20))
    before, after = (check_counts(found, scores, totals) for scores in (clean, dirty))
    assert torch.equal(before[2:], after[2:])
    assert after[:2].tolist() == [0, 40]


@pytest.mark.parametrize("length", [129, 17000])
def test_every_run_gives_the_same_bits(length):
    found = scene(torch.tensor([[[length]]]), 1, torch.float32)
    scores, counts = scores_of("few values", found, 3), torch.tensor([length // 2], device=DEVICE)
    runs = 20 if length < 1000 else 3
    first = select(scores, found.segments, counts, length)
    assert all(torch.equal(select(scores, found.segments, counts, length), first) for _ in range(runs - 1))


if DEVICE == "cpu":  # bytes are counted by the interpreter

    @pytest.mark.parametrize(("sinks", "recent"), [(0, 8), (5, 3)])
    @pytest.mark.parametrize("lengths", [[[70, 3], [0, 129]], [[17000, 9]]], ids=str)
    def test_traffic_is_what_the_kernels_address(lengths, sinks, recent):
        found = scene(torch.tensor([lengths]), 1, torch.float32)
        segments, positions, held = found.segments, found.columns["positions"], found.segments.lengths.tolist()
        scores, kept = scores_of("normal", found, 1), torch.empty(segments.count, 50, dtype=torch.int32)
        counts, owned = torch.full((segments.count,), 30), torch.empty(segments.count, dtype=torch.int32)
        usual = {"positions": positions, "sinks": sinks, "recent": recent}
        tensors = {"scores": scores, "positions": positions.storages, "kept": kept, "counts": owned}
        read = {"recent": recent, "positions": positions if sinks else None}
        with counted(tensors) as one:
            select(scores, segments, counts, 50, out=kept, **usual)
        with counted(tensors) as two:
            counts_of_best(scores, segments, counts[: segments.count // segments.heads], out=owned, **usual)
        for found_bytes, planned in (
            (one, traffic(segments, held, 50, **read)),
            (two, counts_traffic(segments, held, **read)),
        ):
            for counted_bytes, expected in (
                (found_bytes.read, planned.read),
                (found_bytes.written, planned.written),
            ):
                assert counted_bytes == {name: expected[name] for name in tensors if expected.get(name)}
