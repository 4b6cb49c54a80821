"""Decode attention against float64, segment by segment."""

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy_kernels import Column, UnsupportedInputError
from kvpolicy_kernels.decode import decode
from kvpolicy_kernels.division import DecodeShape, Division, traffic
from kvpolicy_kernels.held import Export, Half
from tests.kernels.counting import counted
from tests.kernels.decoding import LAYERS, MIXED, assert_right, call, channels, fp8, run, tokens
from tests.kernels.scenes import DEVICE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = Division(16, 32, 3)  # of segments of up to 96 entries
LOUD = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy reports what a GPU does not


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capacity", [None, 512], ids=["ragged", "dense"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 129, 500])
def test_lengths(length, capacity, dtype):
    lengths = torch.tensor([[[length, max(1, length - 3)]]])
    assert_right(call(lengths, 64, dtype, capacity=capacity, seed=length))


@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("dim", [59, 64, 80, 128])
def test_head_dims_and_groups(dim, group):
    dtype = DTYPES[(dim + group) % 3]
    assert_right(call(LAYERS, dim, dtype, group, seed=dim + group), Division(16, 32, 2))


@pytest.mark.parametrize("division", [None, SMALL], ids=["default", "split"])
@pytest.mark.parametrize("listed", [0, 40], ids=["", "listed"])
@pytest.mark.parametrize("positions", [False, True], ids=["all", "positions"])
@pytest.mark.parametrize("votes", [False, True], ids=["plain", "votes"])
@pytest.mark.parametrize("logits", [False, True], ids=["", "logits"])
@pytest.mark.parametrize("mass", [False, True], ids=["", "mass"])
def test_everything_that_can_be_added(logits, mass, votes, positions, listed, division):
    seed = 8 * logits + 4 * mass + 2 * votes + positions + 100 * listed
    one = call(MIXED, 32, torch.float32, votes=votes, positions=positions, listed=listed, seed=seed)
    assert_right(one, division, logits=logits, mass=mass)


@pytest.mark.parametrize("listed", [0, 20], ids=["", "listed"])
@pytest.mark.parametrize("which", ["keys", "values", "both"])
@pytest.mark.parametrize(("dim", "dtype"), list(zip([64, 80, 128], DTYPES, strict=True)))
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantised_entries_with_tails(bits, dim, which, listed, dtype):
    keys = channels(bits, dim) if which != "values" else None
    values = tokens(bits, dim) if which != "keys" else None
    one = call(MIXED, dim, dtype, keys=keys, values=values, listed=listed, seed=bits + dim + listed)
    assert_right(one, Division(32, 64, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("unit", "dim"), [(8, 59), (24, 64), (64, 64)])
def test_units_that_do_not_fit_into_a_block(unit, dim, dtype):
    stored = {8: torch.float16, 24: torch.float32, 64: dtype}[unit]
    keys, values = channels(4, dim, unit, stored), tokens(4, dim, 1 if dim == 59 else 32, stored)
    assert_right(call(MIXED, dim, dtype, keys=keys, values=values, seed=unit), Division(16, 48, 2))


@pytest.mark.parametrize("listed", [0, 20], ids=["", "listed"])
@pytest.mark.parametrize(("dim", "dtype"), list(zip([59, 64, 128], DTYPES, strict=True)))
def test_float8_entries(dim, listed, dtype):
    one = call(MIXED, dim, dtype, keys=fp8(dim), values=fp8(dim), listed=listed, seed=dim, votes=True)
    assert_right(one, logits=True, mass=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", [fp8(64), channels(4, 64)], ids=["fp8", "quantised"])
def test_packed_keys_are_rounded_to_the_dtype_of_the_model(how, dtype):
    one = call(MIXED, 64, dtype, keys=how, seed=11)
    _, logits, _ = run(one, SMALL, logits=True)
    for queries, keys, found in zip(one.queries, one.keys, logits, strict=True):
        expected = one.scaling * (queries.double() @ keys.double().T)
        assert torch.allclose(found[:, : len(keys)].double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=20)
def test_any_call(dtype, data):
    draw = data.draw
    layers, rows, heads = (draw(st.integers(1, 2)) for _ in range(3))
    count = layers * rows * heads
    lengths = draw(st.lists(st.integers(0, 50), min_size=count, max_size=count))
    dim = draw(st.sampled_from([8, 20, 32]))
    half = st.sampled_from(["plain", "fp8", "quantised"])
    keys, values = (draw(half) for _ in range(2))
    bits = draw(st.sampled_from([2, 4, 8]))
    one = call(
        torch.tensor(lengths).view(layers, rows, heads),
        dim,
        dtype,
        draw(st.integers(1, 9)),
        capacity=draw(st.sampled_from([None, 50])),
        votes=draw(st.booleans()),
        positions=draw(st.booleans()),
        listed=draw(st.sampled_from([0, 0, 1, 17])),
        keys={"plain": None, "fp8": fp8(dim), "quantised": channels(bits, dim, draw(st.integers(1, 20)))}[keys],
        values={"plain": None, "fp8": fp8(dim), "quantised": tokens(bits, dim, 4)}[values],
        seed=draw(st.integers(0, 2**20)),
    )
    block = draw(st.sampled_from([16, 32]))
    item = block * draw(st.integers(1, 3))
    longest = one.found.segments.longest if one.slots is None else one.slots.shape[1]
    division = Division(block, item, -(-longest // item))
    assert_right(one, division, logits=draw(st.booleans()), mass=draw(st.booleans()))


@LOUD
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("division", [None, SMALL])
def test_what_is_not_a_number_stays_in_its_head(where, bad, division):
    one = call(MIXED, 64, torch.float32, seed=3)
    clean, _, _ = run(one, division)
    getattr(one, where)[3][40, 5] = bad
    out, _, _ = run(one, division)
    others = torch.arange(one.found.segments.count) != 3
    assert torch.equal(out[others], clean[others])
    assert not torch.equal(out[3], clean[3])
    wrong = ~out[3].isfinite()
    assert bool(wrong.all() if where == "keys" and bad != bad else wrong[:, 5].any())  # noqa: PLR0124 NaN


def test_a_hidden_entry_may_hold_anything():
    one = call(MIXED, 64, torch.float32, positions=True, seed=4)
    clean, _, _ = run(one, SMALL)
    for place in range(one.found.segments.count):
        positions = one.found.lists("positions")[place]
        row = place % one.found.segments.per_layer // one.found.segments.heads
        hidden = positions > one.seen[row]
        one.keys[place][hidden] = torch.nan
        one.values[place][hidden] = torch.inf
    assert torch.equal(run(one, SMALL)[0], clean)
    assert any(bool((one.found.lists("positions")[0] > seen).any()) for seen in one.seen)


@pytest.mark.parametrize("division", [None, SMALL])
def test_a_query_that_sees_nothing_gives_zeros(division):
    one = call(MIXED, 64, torch.bfloat16, positions=True)
    out, logits, mass = run(attrs.evolve(one, seen=torch.full_like(one.seen, -1)), division, logits=True, mass=True)
    assert not out.any()
    assert bool((logits == -torch.inf).all())
    assert all(bool((layer == 0.5).all()) for layer in mass)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e4])
def test_tiny_and_huge_entries(scale):
    one = call(MIXED, 64, torch.float32, seed=5)
    for keys, values in zip(one.keys, one.values, strict=True):
        keys.mul_(max(1.0, scale))
        values.mul_(scale)
        values[:1] = -0.0
    assert_right(one, SMALL)


def test_equal_logits_share_equally():
    one = call(torch.tensor([[[48]]]), 32, torch.float32, seed=6)
    one.keys[0].copy_(one.keys[0][:1].expand(48, -1).clone())
    _, _, mass = run(one, SMALL, mass=True)
    assert torch.allclose(mass[0][:48] - 0.5, torch.tensor(1 / 48, device=DEVICE), atol=1e-6)


def test_calls_repeat_bit_for_bit():
    one = call(MIXED, 64, torch.bfloat16, votes=True, seed=7)
    first = run(one, SMALL, logits=True)
    again = run(one, SMALL, logits=True)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_int32_lists_are_as_good():
    one = call(MIXED, 64, torch.float32, listed=9, seed=8)
    narrow = attrs.evolve(one, slots=one.slots.int())
    assert torch.equal(run(one, SMALL)[0], run(narrow, SMALL)[0])


def test_holes_in_a_list_are_nothing():
    one = call(MIXED, 64, torch.float32, listed=20, seed=9)
    holes = one.slots.clone()
    holes[:, ::3] = -1
    assert_right(attrs.evolve(one, slots=holes), logits=True, mass=True)


def test_no_segments_give_no_output():
    one = call(MIXED, 64)
    none = attrs.evolve(one.found.segments, starts=one.found.segments.starts[:0], rows=0)
    held = attrs.evolve(one.held, segments=attrs.evolve(none, lengths=none.lengths[:0]))
    assert decode(one.queries[:0], held, 1.0).shape == (0, 4, 64)


@pytest.mark.parametrize("listed", [0, 20])
@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("packing", ["none", "whole", "odd"])
@pytest.mark.parametrize("division", [Division(16, 32, 3), Division(32, 96, 1)])
def test_bytes_planned_are_bytes_addressed(division, packing, more, listed):
    unit = {"none": 0, "whole": 16, "odd": 5}[packing]
    keys, values = (channels(4, 64, unit), tokens(4, 64)) if unit else (None, None)
    one = call(MIXED, 64, torch.bfloat16, votes=more, listed=listed, keys=keys, values=values, seed=10)
    if listed:
        one = attrs.evolve(one, slots=one.slots.clamp(min=0))  # then every place of the list is read
        one = attrs.evolve(one, slots=one.slots.where(one.found.segments.lengths[:, None] > 0, -1))
        division = attrs.evolve(division, splits=-(-listed // division.item))
    found, shown = counts(one, division, more)
    read, lengths = attended(one)
    shape = DecodeShape(
        division, 4, 64, 64, 2, listed or one.found.segments.longest, keys, values,
        votes=more, listed=8 if listed else 0, logits=more, mass=more,
    )  # fmt: skip
    planned = traffic(shape, lengths, read[0], read[1])
    for kind in ("read", "written"):
        wanted = {name: count for name, count in getattr(planned, kind).items() if name not in ("partial", "sums")}
        assert getattr(found, kind) == wanted
    assert shown == planned.launches


def counts(one, division, more):
    """Traffic of all tensors that the caller knows, and how many launches there were."""
    count, group, dim = one.queries.shape
    longest = one.found.segments.longest if one.slots is None else one.slots.shape[1]
    out = torch.empty(count, group, dim, dtype=one.queries.dtype, device=DEVICE)
    logits = torch.empty(count, group, longest, device=DEVICE) if more else None
    mass = [torch.zeros(len(layer), group, device=DEVICE) for layer in one.found.columns["keys"].storages]
    column = Column(torch.tensor([layer.data_ptr() for layer in mass], device=DEVICE), torch.float32, group, (*mass,))
    named = {"queries": one.queries, "out": out}
    named |= {name: one.found.columns[name].storages for name in ("keys", "values")}
    for name in ("keys", "values"):
        half = getattr(one.held, name)
        if half.packed is not None:
            named |= {f"{name}[{place}]": each.storages for place, each in enumerate(half.packed.columns)}
    if more:
        named |= {"votes": one.found.columns["votes"].storages, "logits": logits, "mass": (*mass,)}
    if one.slots is not None:
        named["slots"] = one.slots
    export = Export(logits, column if more else None)
    with counted(named) as found:
        decode(one.queries, one.held, 1.0, slots=one.slots, export=export, out=out, division=division)
    return found, 1 + bool(division.splits > 1 or more)


def attended(one):
    """Packed keys and packed values attended to in each segment, and all entries."""
    lengths = one.found.segments.lengths.tolist()
    packed = []
    for half in (one.held.keys, one.held.values):
        how = half.packed
        sealed = [0] * len(lengths) if how is None else (how.units * how.unpacking.unit).tolist()
        if one.slots is not None:
            sealed = [int(((s >= 0) & (s < n)).sum()) for s, n in zip(one.slots, sealed, strict=True)]
        packed.append(sealed)
    return packed, lengths if one.slots is None else (one.slots >= 0).sum(1).tolist()


@given(
    st.integers(1, 2**18),
    st.integers(1, 4000),
    st.sampled_from([32, 256, 512, 1024]),
    st.booleans(),
    st.floats(0.01, 1),
)
def test_a_division_covers_every_entry(longest, count, row_bytes, packed, filled):
    entries = max(longest, int(longest * count * filled))
    found = Division.of(row_bytes, longest, entries, 132, packed=packed)
    assert found.item % found.block == 0
    assert (found.splits - 1) * found.item < longest <= found.splits * found.item
    assert found.splits <= 64
    share = max(entries / 264, longest / 64, 4 * found.block)  # two programs for each of 132 processors
    assert found.item <= share + found.block


def refused(one, message, **changes):
    options = {"held": one.held, "queries": one.queries, "seen": one.seen, "slots": one.slots, **changes}
    out = torch.full((one.queries.shape[0], one.queries.shape[1], 64), 7.0, dtype=one.queries.dtype, device=DEVICE)
    given_out = options.pop("out", out)
    with pytest.raises(UnsupportedInputError, match=message):
        decode(options.pop("queries"), options.pop("held"), 1.0, out=given_out, **options)
    assert bool((out == 7.0).all())


def test_what_the_kernel_cannot_do_is_refused():
    one = call(MIXED, 64, torch.float32, votes=True, positions=True, listed=5)
    held, queries = one.held, one.queries
    segments = held.segments
    refused(one, "float64", queries=queries.double())
    refused(one, "contiguous", queries=queries.transpose(1, 2))
    refused(one, "segments", queries=queries[:3].contiguous())
    refused(one, "query heads", queries=queries.repeat(1, 20, 1))
    refused(one, "bfloat16", queries=queries.bfloat16(), out=None)
    refused(one, "keys of 64", queries=torch.cat([queries, queries], 2))
    refused(one, "position", seen=None)
    refused(one, "position", seen=one.seen.float())
    refused(one, "chosen slots", slots=one.slots.float())
    refused(one, "chosen slots", slots=one.slots[:2])
    refused(one, "chosen slots", slots=one.slots.T)
    refused(one, "logits", export=Export(torch.empty(4, 4, 3, device=DEVICE)))
    refused(one, "mass", export=Export(mass=held.votes))
    refused(one, "shape or dtype", out=torch.empty(4, 4, 63, device=DEVICE))
    refused(one, "not contiguous", out=torch.empty(4, 64, 4, device=DEVICE).transpose(1, 2))
    refused(one, "positions", held=attrs.evolve(held, positions=held.votes))
    refused(one, "log-votes", held=attrs.evolve(held, votes=held.positions))
    refused(one, "entries a segment", held=attrs.evolve(held, segments=attrs.evolve(segments, longest=2**30)))
    wide = attrs.evolve(held.values.column, width=300)
    refused(one, "head dim 300", held=attrs.evolve(held, values=Half(wide, segments.starts)))
    packed = call(MIXED, 64, torch.float32, keys=channels(4, 64))
    other = attrs.evolve(packed.held.keys.packed, unpacking=channels(2, 64))
    refused(packed, "another kind", held=attrs.evolve(packed.held, keys=attrs.evolve(packed.held.keys, packed=other)))
