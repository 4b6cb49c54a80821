"""Radix select at its limits: next_digit outputs, wide positions, nothing at all, very much, and what is refused."""

import pytest
import torch

from kvpolicy_kernels import Column, Segments, UnsupportedInputError
from kvpolicy_kernels.select.select import counts_of_best, select
from tests.kernels.outputs import Guarded
from tests.kernels.scenes import DEVICE, scene
from tests.kernels.select.selecting import check_select, scores_of


@pytest.mark.parametrize("width", [1, 5, 64, 65, 300])
@pytest.mark.parametrize("kind", ["normal", "special"])
def test_a_width_that_does_not_fit_is_never_written_beyond(kind, width):
    found = scene(torch.tensor([[[0, 30, 129, 150]]]), 1, torch.float32)
    counts = torch.tensor([5, 20, 100, 70], device=DEVICE)
    check_select(found, scores_of(kind, found, 2), counts, sinks=2, recent=4, width=width)


@pytest.mark.parametrize("width", [100, 17000])
def test_a_width_that_does_not_fit_many_programs(width):
    found = scene(torch.tensor([[[17000, 5]]]), 1, torch.float32)
    check_select(found, scores_of("normal", found, 2), torch.tensor([9000, 2], device=DEVICE), width=width)


def test_positions_of_64_bits():
    found = scene(torch.tensor([[[50, 60]]]), 1, torch.float32, seed=9)
    whole = found.columns["positions"].storages[0].long() + (1 << 32)
    wide = Column(torch.tensor([whole.data_ptr()], device=DEVICE), torch.int64, 1, (whole,))
    scores, counts = scores_of("normal", found, 9), torch.tensor([10, 20], device=DEVICE)
    usual = {"recent": 3, "sinks": 5, "positions": wide}
    assert (select(scores, found.segments, counts, 40, **usual)[:, :3] >= 0).all()
    whole -= 1 << 32
    assert torch.equal(select(scores, found.segments, counts, 30, **usual), check_select(
        found, scores, counts, sinks=5, recent=3, width=30))  # fmt: skip


def test_what_the_kernels_cannot_do_is_refused_before_anything_is_written():
    found = scene(torch.tensor([[[20, 30]]]), 1, torch.float32)
    segments, positions = found.segments, found.columns["positions"]
    out = Guarded((2, 9), torch.int32, DEVICE)
    counts = torch.tensor([3, 4], device=DEVICE)
    usual = {"scores": scores_of("normal", found, 0), "segments": segments, "counts": counts, "width": 9}
    usual |= {"positions": positions, "sinks": 1, "out": out.tensor}
    wide = Column(positions.addresses, torch.int32, 2, positions.storages)
    short = Column(positions.addresses, torch.int16, 1, positions.storages)
    for changed in (
        {"scores": usual["scores"].double()},
        {"scores": usual["scores"][:, :29]},
        {"scores": usual["scores"].T.contiguous().T},
        {"counts": counts.float()},
        {"counts": counts[:1]},
        {"width": -1, "out": None},
        {"width": 8},
        {"recent": -1},
        {"positions": None},
        {"positions": wide},
        {"positions": short},
        {"segments": Segments(segments.starts, segments.lengths.long(), 1, 1, 2, 30)},
        {"out": torch.empty(2, 9, dtype=torch.int64, device=DEVICE)},
    ):
        with pytest.raises(UnsupportedInputError):
            select(**{**usual, **changed})
    assert (out.tensor == torch.iinfo(torch.int32).max).all()
    single = {name: usual[name] for name in ("scores", "segments")}
    for totals, more in ((counts, {}), (counts[:1].float(), {}), (counts[:1], {"out": out.tensor})):
        with pytest.raises(UnsupportedInputError):
            counts_of_best(**single, totals=totals, **more)


def test_nothing_at_all():
    empty = torch.empty(0, dtype=torch.int64, device=DEVICE)
    segments = Segments(empty, empty.int(), 1, 0, 2, 5)
    scores = torch.empty(0, 5, device=DEVICE)
    assert select(scores, segments, empty, 7).shape == (0, 7)
    assert counts_of_best(scores, segments, empty).shape == (0,)


if torch.cuda.is_available():

    def test_scores_beyond_two_to_the_31_elements():
        longest = 1 << 17
        segments = Segments(*(torch.zeros(16500, dtype=kind, device=DEVICE) for kind in (torch.int64, torch.int32)),
                            1, 16500, 1, longest)  # fmt: skip
        segments.lengths[-1] = longest
        scores = torch.empty(16500, longest, device=DEVICE)
        scores[-1].normal_()
        counts = torch.full((16500,), 1000, device=DEVICE)
        kept = select(scores, segments, counts, 1000)
        assert torch.equal(kept[-1].long(), scores[-1].topk(1000).indices.sort().values)
        assert (kept[:-1] == -1).all()
