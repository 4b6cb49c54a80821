"""All tiles in one pass: what every kind of tile function is given, and that nothing else is touched."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy_kernels import Column, Tile, UnsupportedInputError, WindowUse
from kvpolicy_kernels.score import launch_config
from kvpolicy_kernels.score.score import scores, traffic
from kvpolicy_kernels.score.tiles.attention import SCORES, attention_votes
from kvpolicy_kernels.score.tiles.key_norm import key_norm
from kvpolicy_kernels.score.tiles.recency import recency
from kvpolicy_kernels.score.tiles.redundancy import directions, mean_similarity
from kvpolicy_kernels.score.tiles.value_norm import value_norm
from tests.kernels.accuracy import assert_twice_as_good
from tests.kernels.counting import counted
from tests.kernels.outputs import Guarded
from tests.kernels.references import scoring
from tests.kernels.references.situations import situation
from tests.kernels.scenes import DEVICE
from tests.support.examples import examples

LENGTHS = st.sampled_from((0, 1, 2, 5, 63, 64, 65, 127, 129))
VOTES = Tile(attention_votes, (SCORES, 0, 0, 0), (0.0,), window=WindowUse(4), keys=False)


@triton.jit
def everything(
    keys,
    values,
    positions,
    newest,
    probabilities,
    voters,
    group,
    attention,
    statistic,
    column,
    length,
    arguments,
    OPTIONS: tl.constexpr,
):
    """A third party's tile that reads all that there is."""
    found = tl.sum(keys * statistic[None, :], 1) * arguments[0] + tl.sum(values, 1) * arguments[1]
    found += tl.sum(tl.sum(probabilities, 2), 1) * voters / group + tl.sum(attention, 1) + column / length
    return found + (newest - positions).to(tl.float32) * OPTIONS[1]


@triton.jit
def doubled(keys):
    return keys * 2.0


def everything_of(head, column):
    """What `everything` should give for one head, [T]."""
    voters = (head.query_positions[-3:] >= 0).sum()
    votes = scoring.probabilities(head, 3, "candidates", False, "none").sum((0, 1))
    found = (head.keys * (2 * head.keys).sum(0)).sum(1) * 0.25 + head.values.sum(1) * -1.5
    found = found + votes * voters / head.queries.shape[0] + head.attention.sum(1)
    return found + column.to(found.dtype) / max(len(column), 1) + (head.newest - head.positions) * 3


EVERYTHING = Tile(
    everything,
    (7, 3),
    (0.25, -1.5),
    window=WindowUse(3, "candidates", causal=False),
    values=True,
    newest=True,
    attention=True,
    statistic=doubled,
    column=lambda request: torch.zeros(request.segments.count, request.segments.longest),
)


@pytest.fixture(autouse=True)
def _numpy_is_silent():
    with np.errstate(all="ignore"):  # inf and NaN are meant in some tests, and the interpreter computes with NumPy
        yield


def found_in(given, tiles, extra=None, **named):
    out = Guarded((len(tiles), given.scene.segments.count, given.scene.segments.longest), torch.float32, DEVICE)
    extra = extra or [None] * len(tiles)
    parts = (given.scene.segments, given.scene.columns, given.window, tiles, extra)
    scores(*parts, **given.protect, out=out.tensor, **named)
    out.check()
    return out.tensor.cpu()


def check_rows(found, given, naive):
    """[P, T] against what `naive` says of each head; zeros behind lengths."""
    pairs = zip(scoring.heads(given), scoring.heads(given, torch.float32), strict=True)
    for row, (exact, single) in zip(found, pairs, strict=True):
        count = len(exact.positions)
        assert_twice_as_good(row[:count], naive(single), naive(exact))
        assert (row[count:] == 0).all()


@settings(max_examples=examples(6))
@given(
    st.lists(LENGTHS, min_size=4, max_size=4),
    st.sampled_from((16, 59, 80)),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    st.integers(0, 99),
)
def test_a_third_party_beside_built_in_tiles(lengths, dim, dtype, seed):
    shape = {"group": 1 + seed % 4, "width": (1, 4, 5)[seed % 3], "votes": seed % 2 == 0, "sinks": seed % 3}
    given = situation([[lengths[:2]], [lengths[2:]]], dim, dtype, **shape, seed=seed)
    segments = given.scene.segments
    column = torch.randn(segments.count, segments.longest, device=DEVICE)
    found = found_in(given, [Tile(key_norm), EVERYTHING, VOTES], [None, column, None])

    check_rows(found[0], given, lambda head: -head.keys.norm(dim=1))
    columns = [own[:length] for own, length in zip(column.cpu(), segments.lengths.tolist(), strict=True)]
    pairs = zip(scoring.heads(given), scoring.heads(given, torch.float32), strict=True)
    for row, own, (exact, single) in zip(found[1], columns, pairs, strict=True):
        assert_twice_as_good(row[: len(own)], everything_of(single, own), everything_of(exact, own))
        assert (row[len(own) :] == 0).all()
    check_rows(found[2], given, _votes_of)


def _votes_of(head):
    voters = (head.query_positions[-4:] >= 0).sum().clamp(min=1)
    return scoring.probabilities(head, 4, "all", True, "none").sum(1).mean(0) / voters


@pytest.mark.parametrize(("capacity", "busy"), [(None, 528), (700, 528), (700, 10), (None, 2)])
def test_heads_of_several_blocks(capacity, busy, monkeypatch):
    # a program takes one block of a head, some, or all
    monkeypatch.setattr(launch_config, "_CONCURRENT_PROGRAMS", busy)
    given = situation([[[700, 130], [0, 65]]], capacity=capacity, votes=True)
    found = found_in(given, [VOTES, Tile(recency, keys=False, newest=True)])

    check_rows(found[0], given, _votes_of)
    check_rows(found[1], given, lambda head: (head.positions - head.newest).to(head.keys.dtype))


@pytest.mark.parametrize("dim", [59, 64])
@pytest.mark.parametrize("tile", [Tile(key_norm), Tile(mean_similarity, statistic=directions)])
def test_tiles_without_a_window_need_none(tile, dim):
    given = situation([[[65, 3]]], dim)
    out = scores(given.scene.segments, given.scene.columns, None, [tile], [None], **given.protect)

    assert torch.equal(out.cpu(), found_in(given, [tile]))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_in_its_head(wrong):
    given = situation([[[20, 20], [20, 20]]])
    before = found_in(given, [VOTES, Tile(key_norm), Tile(mean_similarity, statistic=directions)])
    start = int(given.scene.segments.starts[1])
    given.scene.columns["keys"].storages[0][start + 7] = wrong
    found = found_in(given, [VOTES, Tile(key_norm), Tile(mean_similarity, statistic=directions)])

    assert torch.equal(found[:, [0, 2, 3]], before[:, [0, 2, 3]])
    assert not found[:, 1, 7].isfinite().any()
    wanted = [_votes_of(head) for head in scoring.heads(given)][1]
    assert torch.equal(found[0, 1].isnan(), wanted.isnan())


def test_same_use_twice_and_two_uses():
    given = situation([[[65, 20]]], votes=True)
    other = Tile(attention_votes, (SCORES, 0, 0, 0), (0.0,), window=WindowUse(2, "candidates"), keys=False)
    found = found_in(given, [VOTES, other, VOTES])
    alone = found_in(given, [other])

    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], alone[0])


def test_order_of_arguments_and_options_is_kept():
    given = situation([[[20, 5]]])
    ones, twos = Tile(value_norm, (1,), (1.0,), values=True, keys=False), Tile(value_norm, (2,), (2.0,), values=True)
    found = found_in(given, [twos, ones])

    check_rows(found[0], given, lambda head: head.values.norm(dim=1))
    check_rows(found[1], given, lambda head: head.values.abs().sum(1))


@pytest.mark.parametrize("repeat", range(3))
def test_repeats_are_bitwise_equal(repeat):
    given = situation([[[129, 20]]], votes=True, seed=repeat)

    assert torch.equal(found_in(given, [VOTES, Tile(key_norm)]), found_in(given, [VOTES, Tile(key_norm)]))


@pytest.mark.parametrize(
    "tiles",
    [
        [Tile(recency, keys=False, newest=True)],
        [VOTES, Tile(key_norm)],
        [EVERYTHING, VOTES],
        [Tile(value_norm, (2,), (2.0,), values=True, keys=False), Tile(mean_similarity, statistic=directions)],
    ],
)
@pytest.mark.parametrize("busy", [2, 528])
def test_bytes_are_what_traffic_says(tiles, busy, monkeypatch):
    monkeypatch.setattr(launch_config, "_CONCURRENT_PROGRAMS", busy)
    lengths = [[[200, 70], [0, 65]], [[1, 64], [128, 129]]]
    given = situation(lengths, votes=True)
    segments, columns, window = given.scene.segments, given.scene.columns, given.window
    extra = [None if tile.column is None else torch.randn(8, 200) for tile in tiles]
    out = torch.empty(len(tiles), 8, 200)
    named = {name: columns[name].storages for name in ("keys", "values", "positions", "log_votes", "attention")}
    named |= {"queries": window.queries, "scores": out, "columns": tuple(one for one in extra if one is not None)}
    with counted(named) as seen:
        scores(segments, columns, window, tiles, extra, **given.protect, out=out)
    said = traffic(segments, columns, window, tiles, torch.tensor(lengths).flatten().tolist())
    assert (seen.read, seen.written) == (said.read, said.written)


def test_guards_refuse_before_anything_is_written():
    given = situation([[[9, 9]]])
    segments, columns = given.scene.segments, given.scene.columns
    keys = columns["keys"]
    good = {"segments": segments, "columns": columns, "window": given.window, "tiles": [VOTES], "extra": [None]}
    good |= {"sinks": 0, "recent": 0}
    wide = [torch.zeros(1, 1, 9, 300)]
    bad = [
        {"tiles": [], "extra": []},
        {"extra": [None, None]},
        {"extra": [torch.zeros(2, 9)]},
        {"tiles": [EVERYTHING]},
        {"window": None},
        {"window": situation([[[9, 9, 9]]]).window},
        {"window": situation([[[9, 9]]], 32).window},
        {"window": situation([[[9, 9]]], dtype=torch.float16).window},
        {"window": situation([[[9, 9]]], group=32, width=32).window},
        {"columns": {name: one for name, one in columns.items() if name != "positions"}},
        {"columns": {**columns, "positions": keys}},
        {"columns": {**columns, "keys": Column.of(wide)}},
        {"columns": {**columns, "keys": Column(keys.addresses, torch.float64, 16, keys.storages)}},
        {"columns": {**columns, "keys": Column(keys.addresses[:0], torch.float32, 16, keys.storages)}},
        {"sinks": -1},
        {"recent": -1},
    ]
    for one in bad:
        out = torch.full((1, 2, 9), 7.0, device=DEVICE)
        with pytest.raises(UnsupportedInputError):
            scores(**{**good, **one}, out=out)
        assert (out == 7).all()


@pytest.mark.parametrize("out", [torch.empty(1, 2, 8), torch.empty(1, 9, 2).transpose(1, 2), torch.empty(2, 9)])
def test_guards_refuse_wrong_outputs(out):
    given = situation([[[9, 9]]])
    parts = (given.scene.segments, given.scene.columns, given.window, [VOTES], [None])
    with pytest.raises(UnsupportedInputError, match="scores"):
        scores(*parts, **given.protect, out=out)
