"""Radix select, against sorted lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy_kernels import Column, Segments, UnsupportedInputError
from kvpolicy_kernels.select import counts_of_best, counts_traffic, select, traffic
from kvpolicy_plugins.allocators.adaptive import Adaptive
from kvpolicy_plugins.selectors.topk import TopK
from tests.kernels.counting import counted
from tests.kernels.outputs import Guarded
from tests.kernels.references import select as reference
from tests.kernels.scenes import DEVICE, Scene, scene

KINDS = ("normal", "few values", "equal", "one-hot", "special", "near zero", "NaN")
SPECIAL = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45, 1.1e-38, 1.0, -1.0, 3.4e38, -3.4e38)
SMALL = [0, 1, 2, 63, 64, 65, 127, 129]


def scores_of(kind: str, found: Scene, seed: int) -> torch.Tensor:
    """[P, T] float32, NaN behind lengths."""
    random = torch.Generator().manual_seed(seed)
    shape = (found.segments.count, found.segments.longest)
    noise = torch.randn(shape, generator=random)
    scores = {
        "normal": noise,
        "few values": (noise * 2).round() / 2,
        "equal": torch.full(shape, float(noise.flatten()[0])),
        "one-hot": (torch.arange(shape[1]) == shape[1] // 2).float().expand(shape).clone(),
        "special": torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), shape, generator=random)],
        "near zero": torch.tensor([0.0, -0.0, 1e-45, -1e-45])[torch.randint(0, 4, shape, generator=random)],
        "NaN": torch.full(shape, torch.nan),
    }[kind]
    behind = torch.arange(shape[1]) >= found.segments.lengths.cpu()[:, None]
    return scores.masked_fill(behind, torch.nan).to(DEVICE)


def check_select(found: Scene, scores, counts, *, sinks=0, recent=0, width=None) -> torch.Tensor:
    rows = zip(scores.cpu(), found.lists("positions"), counts.tolist(), strict=True)
    expected = [
        reference.kept(row[: len(positions)], positions, count, sinks, recent) for row, positions, count in rows
    ]
    width = max(1, *map(len, expected)) if width is None else width
    out = Guarded((found.segments.count, width), torch.int32, DEVICE)
    positions = found.columns["positions"]
    kept = select(
        scores, found.segments, counts, width, positions=positions, sinks=sinks, recent=recent, out=out.tensor
    )
    out.check()
    assert kept is out.tensor
    assert kept.tolist() == [(slots + [-1] * width)[:width] for slots in expected]
    return kept


def check_counts(found: Scene, scores, totals, *, sinks=0, recent=0) -> torch.Tensor:
    out = Guarded((found.segments.count,), torch.int32, DEVICE)
    positions = found.columns["positions"]
    counts_of_best(scores, found.segments, totals, positions=positions, sinks=sinks, recent=recent, out=out.tensor)
    out.check()
    places, heads, expected = found.lists("positions"), found.segments.heads, []
    for group, total in enumerate(totals.tolist()):
        mine = slice(group * heads, (group + 1) * heads)
        held = [row[: len(one)] for row, one in zip(scores[mine].cpu(), places[mine], strict=True)]
        expected += reference.owned(held, places[mine], total, sinks, recent)
    assert out.tensor.tolist() == expected
    return out.tensor


def budgets(count: int, most: int, dtype=torch.int64) -> torch.Tensor:
    """None, one, some, all and too many, in turn."""
    usual = [0, 1, most // 3, most - 1, most, most + 7, -2]
    return torch.tensor([usual[one % len(usual)] for one in range(count)], dtype=dtype, device=DEVICE)


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
@settings(max_examples=30)
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
    assert counts.reshape(2, 3).tolist() == Adaptive(floor=0.0).allocate(shaped, candidates, totals).tolist()
    chosen = TopK().select(shaped, candidates, counts.reshape(2, 3).long()) | ~candidates
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
