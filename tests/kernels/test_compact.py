"""What is kept moves, bit for bit; nothing else changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy_kernels import Column, Segments, UnsupportedInputError, compact_holes, compact_ordered
from kvpolicy_kernels.compact import compact, compact_to, traffic, traffic_to
from tests.kernels.counting import counted
from tests.kernels.outputs import Guarded
from tests.kernels.scenes import DEVICE, scene

EIGHT = torch.float8_e4m3fn
EXTRA = {"votes": ((), torch.float32), "attention": ((3,), torch.float32), "flags": ((), torch.bool)}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, EIGHT]
NUMBERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def random_kept(lengths, share, random):
    """Ascending slots of every segment, about that share of them; [P, N] int32."""
    rows = [(torch.rand(length, generator=random) < share).nonzero().flatten() for length in lengths.tolist()]
    width = max(map(len, rows))
    padded = [torch.cat([row, row.new_full((width - len(row),), -1)]) for row in rows]
    return torch.stack(padded).to(torch.int32).to(DEVICE)


def bits(tensor):
    """As integers [slots, bytes], so that NaN equals itself."""
    return tensor.reshape(len(tensor), -1).contiguous().view(torch.uint8).clone()


def snapshot(columns):
    return {name: [bits(one) for one in column.storages] for name, column in columns.items()}


def moves_of(slots, ordered):
    """(from, to) of every kept entry of a segment."""
    if ordered:
        return list(enumerate(slots))
    count = len(slots)
    holes = [slot for slot in range(count) if slot not in slots]
    movers = [slot for slot in slots if slot >= count]
    return [(slot, slot) for slot in slots if slot < count] + list(zip(holes, movers, strict=True))


def expected(before, segments, kept, ordered):
    """All storages after compaction, moved entry by entry; and how many entries have changed their slot."""
    after = {name: [one.clone() for one in storages] for name, storages in before.items()}
    moved = 0
    for place, (start, length) in enumerate(zip(segments.starts.tolist(), segments.lengths.tolist(), strict=True)):
        slots = [slot for slot in kept[place].tolist() if slot >= 0]
        layer = place // segments.per_layer
        moves = moves_of(slots, ordered)
        moved += sum(one != other for one, other in moves)
        for name, storages in after.items():
            for target, source in moves:
                storages[layer][start + target] = before[name][layer][start + source]
            if name == "positions":
                storages[layer][start + len(slots) : start + length] = 255  # the bytes of -1
    return after, moved


def check(found, kept, *, ordered):
    columns, segments = found.columns, found.segments
    before = snapshot(columns)
    after, moved = expected(before, segments, kept, ordered)
    out = Guarded((segments.count,), torch.int32, DEVICE)
    lengths = segments.lengths.clone()
    rest = [column for name, column in columns.items() if name != "positions"]
    compact(segments, kept, rest, ordered=ordered, positions=columns["positions"], out=out.tensor)
    out.check()
    assert out.tensor.tolist() == (kept >= 0).sum(-1).tolist()
    assert torch.equal(segments.lengths, lengths)
    for name, storages in snapshot(columns).items():
        for layer, storage in enumerate(storages):
            wrong = (storage != after[name][layer]).any(-1).nonzero().flatten().tolist()
            assert not wrong, f"{name} of layer {layer} differs in slots {wrong[:5]}"
    return moved


@pytest.fixture(params=["as shipped", "many chunks"])
def chunks(request, monkeypatch):
    """As shipped, a short segment is one chunk and there are many programs; or many chunks and few programs."""
    if request.param == "many chunks":
        monkeypatch.setattr(compact_ordered, "_IN_FLIGHT", 1024)
        monkeypatch.setattr(compact_ordered, "_MOST_ROWS", 32)
        monkeypatch.setattr(compact_ordered, "_BUSY", 0)
        monkeypatch.setattr(compact_holes, "_ROWS", 16)
        monkeypatch.setattr(compact_holes, "_POSITIONS", 32)
        monkeypatch.setattr(compact_holes, "_MOST_PARTS", 2)
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


@settings(max_examples=50)
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


@pytest.mark.parametrize("length", [1, 31, 64, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, EIGHT])
def test_copies_go_from_dense_to_ragged_storages(length, dtype):
    lengths = torch.tensor([[[length, 0], [3, length]], [[length // 2, 1], [length, length]]])
    found = scene(lengths, 20, dtype, capacity=length + 2 if length > 3 else 5, extra=EXTRA, seed=length)
    kept = random_kept(lengths.flatten(), 0.5, torch.Generator().manual_seed(length))
    room = (kept >= 0).sum(-1).view(lengths.shape) + 2
    onto = scene(room, 20, dtype, extra=EXTRA, seed=length + 1)
    before, after = snapshot(found.columns), snapshot(onto.columns)
    for place, slots in enumerate(kept.tolist()):
        start, target = int(found.segments.starts[place]), int(onto.segments.starts[place])
        for name, storages in after.items():
            layer = place // 4
            for index, slot in enumerate(slots):
                if slot >= 0:
                    storages[layer][target + index] = before[name][layer][start + slot]
    out = Guarded((8,), torch.int32, DEVICE)
    names = list(found.columns)
    source, target = ([one.columns[name] for name in names] for one in (found, onto))
    compact_to(found.segments, kept, source, onto.segments, target, out=out.tensor)
    out.check()
    assert out.tensor.tolist() == (kept >= 0).sum(-1).tolist()
    for name, storages in snapshot(onto.columns).items():
        assert all(map(torch.equal, storages, after[name])), name
    for name, storages in snapshot(found.columns).items():
        assert all(map(torch.equal, storages, before[name])), f"{name} of the source has changed"


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


def test_traffic_of_copies():
    lengths = torch.tensor([[[70, 33]]])
    found, onto = (scene(lengths, 64, torch.bfloat16, extra=EXTRA) for _ in range(2))
    kept = random_kept(lengths.flatten(), 0.6, torch.Generator().manual_seed(1))
    names, out = list(found.columns), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    source, target = ([one.columns[name] for name in names] for one in (found, onto))
    reads = {**{name: column.storages for name, column in found.columns.items()}, "kept": kept}
    writes = {**{name: column.storages for name, column in onto.columns.items()}, "lengths": out}
    with counted(reads) as read, counted(writes) as written:
        compact_to(found.segments, kept, source, onto.segments, target, out=out)
    said = traffic_to(found.segments, found.columns, kept.shape[1], kept=int((kept >= 0).sum()))
    assert (read.read, written.written) == (said.read, said.written)
    assert not read.written
    assert not written.read


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


def refused():
    """Arguments that must be refused, by what is wrong with them."""
    found = scene(torch.tensor([[[20, 10]]]), 8, torch.float32)
    segments, keys, positions = found.segments, found.columns["keys"], found.columns["positions"]
    kept = torch.arange(4, dtype=torch.int32, device=DEVICE).expand(2, 4).contiguous()
    good = {"segments": segments, "kept": kept, "columns": [keys], "ordered": True, "positions": positions}
    shifted = keys.storages[0].flatten()[1:]
    misplaced = Column(torch.tensor([shifted.data_ptr()], device=DEVICE), torch.float32, 8, (shifted,))
    wide = Column(keys.addresses, torch.float32, 1 << 14, keys.storages)
    return [
        {**good, "kept": kept.long()},
        {**good, "kept": kept[:1]},
        {**good, "kept": kept.t().contiguous().t()},
        {**good, "columns": [misplaced]},
        {**good, "columns": [wide]},
        {**good, "columns": [Column(keys.addresses.repeat(2), torch.float32, 8, keys.storages)]},
        {**good, "positions": keys},
        {**good, "out": segments.lengths},
        {**good, "out": torch.zeros(2, dtype=torch.int64, device=DEVICE)},
        {**good, "out": torch.zeros(3, dtype=torch.int32, device=DEVICE)},
        {**good, "segments": Segments(segments.starts.to("meta"), segments.lengths, 1, 1, 2, 20)},
    ]


@pytest.mark.parametrize("case", range(11))
def test_what_cannot_be_moved_is_refused_before_anything_has_changed(case):
    arguments = refused()[case]
    before = [one.clone() for column in arguments["columns"] for one in column.storages]
    with pytest.raises(UnsupportedInputError):
        compact(**arguments)
    after = [one for column in arguments["columns"] for one in column.storages]
    assert all(torch.equal(one.nan_to_num(7), other.nan_to_num(7)) for one, other in zip(before, after, strict=True))


def test_copies_that_cannot_be_made_are_refused():
    found, onto = (scene(torch.tensor([[[20, 10]]]), 8, torch.float32) for _ in range(2))
    other = scene(torch.tensor([[[20, 10]]]), 8, torch.float16)
    rows = scene(torch.tensor([[[20]], [[10]]]), 8, torch.float32)
    kept = torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)
    for target in (found, other, rows):
        with pytest.raises(UnsupportedInputError):
            compact_to(found.segments, kept, [found.columns["keys"]], target.segments, [target.columns["keys"]])
    compact_to(found.segments, kept, [found.columns["keys"]], onto.segments, [onto.columns["keys"]])


if torch.cuda.is_available():

    @pytest.mark.parametrize("ordered", [True, False])
    def test_more_than_two_billion_elements(ordered):
        slots, width = 2**24 + 400, 128
        storage = torch.zeros(slots, width, dtype=torch.int8, device=DEVICE)
        storage[-300:] = torch.randint(1, 100, (300, width), device=DEVICE).to(torch.int8)
        rows = storage[-300:].clone()
        column = Column(torch.tensor([storage.data_ptr()], device=DEVICE), torch.int8, width, (storage,))
        starts = torch.tensor([slots - 300], device=DEVICE)
        segments = Segments(starts, torch.tensor([300], dtype=torch.int32, device=DEVICE), 1, 1, 1, 300)
        kept = torch.arange(100, 300, dtype=torch.int32, device=DEVICE)[None]
        compact(segments, kept, [column], ordered=ordered)
        moved = rows[100:] if ordered else torch.cat([rows[200:], rows[100:200]])
        assert torch.equal(storage[-300:-100], moved)
        assert not storage[:-300].any()
