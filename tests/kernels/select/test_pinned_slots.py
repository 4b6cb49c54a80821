"""Radix select where slots are protected by a label, beside sinks and recent entries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy_kernels import UnsupportedInputError
from kvpolicy_kernels.select.select import counts_of_best, counts_traffic, select, traffic
from tests.kernels.counting import counted
from tests.kernels.scenes import DEVICE, LABELS, label, scene
from tests.kernels.select.selecting import KINDS, budgets, check_counts, check_select, scores_of
from tests.support.examples import examples

SMALL = [0, 1, 2, 63, 64, 65, 127, 129]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", LABELS)
def test_labels_of_short_heads(labels, kind):
    found = scene(torch.tensor(SMALL).reshape(1, 2, 4), 1, torch.float32, seed=3)
    protect = {"sinks": 5, "recent": 3, "pinned": label(labels, found.segments, 3)}
    scores = scores_of(kind, found, seed=1)
    check_select(found, scores, budgets(len(SMALL), 60), **protect)
    check_counts(found, scores, torch.tensor([130, 17], device=DEVICE), **protect)


@pytest.mark.timeout(600)
@settings(max_examples=examples(20))
@given(
    lengths=st.lists(st.integers(0, 100), min_size=4, max_size=4),
    shape=st.sampled_from([(1, 1, 4), (2, 1, 2), (1, 4, 1), (1, 2, 2)]),
    kind=st.sampled_from(KINDS),
    labels=st.sampled_from(LABELS),
    counts=st.lists(st.integers(-1, 160), min_size=4, max_size=4),
    sinks=st.integers(0, 12),
    recent=st.integers(0, 12),
    capacity=st.sampled_from([None, 150]),
    seed=st.integers(0, 2**20),
)
def test_any_labels_of_any_segments(lengths, shape, kind, labels, counts, sinks, recent, capacity, seed):
    found = scene(torch.tensor(lengths).reshape(shape), 1, torch.float32, capacity=capacity, seed=seed)
    protect = {"sinks": sinks, "recent": recent, "pinned": label(labels, found.segments, seed)}
    scores = scores_of(kind, found, seed)
    check_select(found, scores, torch.tensor(counts, device=DEVICE), **protect)
    check_counts(found, scores, torch.tensor(counts[: shape[0] * shape[1]], device=DEVICE) * 2, **protect)


@pytest.mark.parametrize("labels", ["some", "rows"])
def test_many_programs_share_a_head(labels):
    found = scene(torch.tensor([[[17000, 8191]]]), 1, torch.float32, seed=1)
    protect = {"sinks": 6, "recent": 32, "pinned": label(labels, found.segments, 2)}
    scores = scores_of("few values", found, 1)
    check_select(found, scores, torch.tensor([7000, 3000], device=DEVICE), **protect)
    check_counts(found, scores, torch.tensor([8000], device=DEVICE), **protect)


def test_a_label_of_no_slot_changes_nothing_and_bytes_may_be_its_items():
    found = scene(torch.tensor([[[70, 20], [0, 129]]]), 1, torch.float32)
    scores, counts = scores_of("normal", found, 1), torch.full((4,), 30, device=DEVICE)
    usual = {"positions": found.columns["positions"], "sinks": 2, "recent": 3}
    plain = select(scores, found.segments, counts, 50, **usual)
    pinned = label("some", found.segments, 5)
    as_bytes = select(scores, found.segments, counts, 99, **usual, pinned=pinned.to(torch.uint8) * 255)

    assert torch.equal(select(scores, found.segments, counts, 50, **usual, pinned=torch.zeros_like(pinned)), plain)
    assert torch.equal(as_bytes, select(scores, found.segments, counts, 99, **usual, pinned=pinned))


def test_labels_that_kernels_cannot_read_are_refused():
    found = scene(torch.tensor([[[20, 30]]]), 1, torch.float32)
    scores, counts = scores_of("normal", found, 1), torch.tensor([3, 4], device=DEVICE)
    good = label("some", found.segments)
    for bad in (good.int(), good[:, :29], good[:1], good.T.contiguous().T):
        with pytest.raises(UnsupportedInputError, match="pinned"):
            select(scores, found.segments, counts, 9, pinned=bad)
        with pytest.raises(UnsupportedInputError, match="pinned"):
            counts_of_best(scores, found.segments, counts[:1], pinned=bad)


if DEVICE == "cpu":  # bytes are counted by the interpreter

    @pytest.mark.parametrize("sinks", [0, 5])
    @pytest.mark.parametrize("lengths", [[[70, 3], [0, 129]], [[17000, 9]]], ids=str)
    def test_traffic_is_what_the_kernels_address(lengths, sinks):
        found = scene(torch.tensor([lengths]), 1, torch.float32)
        segments, positions, held = found.segments, found.columns["positions"], found.segments.lengths.tolist()
        scores, pinned = scores_of("normal", found, 1), label("some", segments)
        counts, kept = torch.full((segments.count,), 30), torch.empty(segments.count, 50, dtype=torch.int32)
        usual = {"positions": positions, "sinks": sinks, "recent": 3, "pinned": pinned}
        tensors = {"scores": scores, "positions": positions.storages, "kept": kept, "pinned": pinned}
        read = {"recent": 3, "positions": positions if sinks else None, "pinned": True}
        with counted(tensors) as one:
            select(scores, segments, counts, 50, out=kept, **usual)
        with counted(tensors) as two:
            counts_of_best(scores, segments, counts[: segments.count // segments.heads], **usual)
        for seen, planned in (
            (one, traffic(segments, held, 50, **read)),
            (two, counts_traffic(segments, held, **read)),
        ):
            for found_bytes, expected in ((seen.read, planned.read), (seen.written, planned.written)):
                assert found_bytes == {name: expected[name] for name in tensors if expected.get(name)}
