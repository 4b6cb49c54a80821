"""R-KV's forgiven similarities, against the matrix of all pairs in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy_kernels import Column, Segments
from kvpolicy_kernels.score.redundancy.forgiven_similarity import forgiven_similarity, traffic
from kvpolicy_kernels.score.redundancy.similar_keys import find_similar
from kvpolicy_plugins.scorers.attention_free.redundancy import Redundancy
from tests.golden.families import FOLDER, Vectors
from tests.kernels.counting import counted
from tests.kernels.references import redundancy as reference
from tests.kernels.scenes import DEVICE, DTYPES
from tests.kernels.score.similar_keys import KINDS, check, keys_of, place, threshold_for
from tests.support.examples import examples
from tests.support.views import view_of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 129])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 59), (torch.bfloat16, 64), (torch.float16, 80)], ids=str)
def test_lengths_and_dtypes(kind, length, dtype, dim):
    check(keys_of(kind, torch.tensor([[[length]]]), dim, dtype, seed=length))


@pytest.mark.parametrize(("kind", "dtype", "end"), [
    ("clustered", torch.bfloat16, "last"),
    ("isotropic", torch.float16, "first"),
    ("duplicates", torch.float32, "last"),
])  # fmt: skip
def test_several_chunks_of_columns(kind, dtype, end):
    check(keys_of(kind, torch.tensor([[[515]]]), 32, dtype, seed=1), end=end)


@pytest.mark.parametrize("empty_row", ["slot0", "none"])
@pytest.mark.parametrize("end", ["last", "first"])
@pytest.mark.parametrize("forgive", [0, 1, 2, 16])
@pytest.mark.parametrize(("kind", "dtype"), list(zip(KINDS, (*DTYPES, torch.bfloat16), strict=True)), ids=str)
def test_options(kind, forgive, end, empty_row, dtype):
    found = keys_of(kind, torch.tensor([[[67, 3]]]), 16, dtype, seed=forgive)
    check(found, forgive=forgive, end=end, empty_row=empty_row, near=0.3)


LAYOUTS = [
    torch.tensor([[[37, 1, 64, 5]]]),
    torch.tensor([[[0, 20]], [[7, 0]]]),
    torch.tensor([[[66, 9], [130, 0]], [[2, 33], [1, 65]], [[0, 0], [0, 0]]]),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capacity", [None, 140])
@pytest.mark.parametrize("lengths", LAYOUTS, ids=["heads", "layers", "all"])
def test_ragged_and_dense_segments_of_several_layers(lengths, capacity, dtype):
    result = check(keys_of("clustered", lengths, 16, dtype, seed=4, capacity=capacity))
    for row, length in zip(result, lengths.flatten().tolist(), strict=True):
        assert not row[length:].any()


@pytest.mark.timeout(600)
@settings(max_examples=examples(10))
@given(
    lengths=st.lists(st.integers(0, 70), min_size=4, max_size=4),
    dim=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    forgive=st.integers(0, 4),
    end=st.sampled_from(["last", "first"]),
    empty_row=st.sampled_from(["slot0", "none"]),
    near=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**20),
)
def test_any_segments(lengths, dim, dtype, kind, forgive, end, empty_row, near, seed):
    found = keys_of(kind, torch.tensor(lengths).reshape(2, 1, 2), dim, dtype, seed)
    check(found, near=near, forgive=forgive, end=end, empty_row=empty_row)


@pytest.mark.parametrize("name", ["clustered", "duplicates", "isolated"])
@pytest.mark.parametrize(("forgive", "mode"), [(1, "last"), (0, "first")])
def test_published_similarities(name, forgive, mode):
    """Mode `first` of the published code takes those that look different for slot 0: every entry forgives it."""
    vectors = Vectors(FOLDER / f"rkv_similarity_{name}.npz")
    keys = vectors["k"].to(DEVICE)
    segments = Segments.of([keys], torch.full(keys.shape[:2], keys.shape[2], device=DEVICE)[None])
    sums = forgiven_similarity(segments, Column.of([keys]), threshold=vectors.parameter("threshold"), forgive=forgive)
    directions = keys[0].double() / (keys[0].double().norm(dim=-1, keepdim=True) + 1e-8)
    everyone = directions @ directions.transpose(-1, -2) - torch.eye(keys.shape[2], device=DEVICE)
    scores = ((everyone.sum(1) - sums) / keys.shape[2]).softmax(-1)
    torch.testing.assert_close(scores.float().cpu(), vectors[f"redundancy_{mode}"], atol=2e-8, rtol=1e-6)


@pytest.mark.parametrize("end", ["last", "first"])
@pytest.mark.parametrize("forgive", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_as_the_plugin(seed, forgive, end):
    """The scorer's own formula around the kernel gives the scorer's scores."""
    found = keys_of("clustered", torch.tensor([[[90, 90]]]), 24, torch.float32, seed, capacity=90)
    keys = torch.stack(found.lists("keys"))[None].cpu()
    threshold = threshold_for(found)
    plugin = Redundancy(threshold, forgive=forgive, forgive_end=end)
    sums = forgiven_similarity(
        found.segments, found.columns["keys"], threshold=threshold, forgive=forgive, end=end
    ).cpu()
    pairs = torch.stack([reference.similarities(one.double()) for one in keys[0]])
    mean = (pairs.sum(1) - sums) / 90
    torch.testing.assert_close(mean.softmax(-1).float(), plugin.score(view_of(keys))[0], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "forgive"), [(torch.bfloat16, 1), (torch.float16, 3)], ids=str)
def test_every_run_gives_the_same_bits(dtype, forgive):
    found = keys_of("duplicates", torch.tensor([[[70]]]), 16, dtype, 6)
    threshold = threshold_for(found)
    first = forgiven_similarity(*place(found), threshold=threshold, forgive=forgive)
    for _ in range(19):
        assert torch.equal(forgiven_similarity(*place(found), threshold=threshold, forgive=forgive), first)


def test_order_of_segments_and_dirt_behind_them_do_not_matter():
    found = keys_of("clustered", torch.tensor([[[65, 30, 90]]]), 16, torch.float32, 5)
    segments = found.segments
    turned = Segments(segments.starts.flip(0), segments.lengths.flip(0), 1, 1, 3, segments.longest)
    options = {"threshold": 0.5, "forgive": 1}
    sums = forgiven_similarity(segments, found.columns["keys"], **options)
    assert torch.equal(forgiven_similarity(turned, found.columns["keys"], **options), sums.flip(0))


def pairs_of(targets, lengths, empty_row):
    """How many pairs of entries forgive."""
    chosen = [targets[place, :length] for place, length in enumerate(lengths)]
    lonely = sum(int((one < 0).all(-1)[1:].sum()) for one in chosen) if empty_row == "slot0" else 0
    return lonely + sum(int((one >= 0).sum()) for one in chosen)


if DEVICE == "cpu":  # bytes are counted by the interpreter

    @pytest.mark.parametrize(("forgive", "empty_row"), [(0, "slot0"), (1, "slot0"), (1, "none"), (3, "slot0")])
    @pytest.mark.parametrize(("kind", "near", "dtype"), [
        ("clustered", 0.5, torch.float32),
        ("isotropic", 0.999, torch.bfloat16),
    ], ids=str)  # fmt: skip
    def test_traffic_is_what_the_kernels_address(kind, near, forgive, empty_row, dtype):
        found = keys_of(kind, torch.tensor([[[70, 0]], [[130, 2]]]), 20, dtype, 1)
        (segments, keys), lengths = place(found), found.segments.lengths.tolist()
        out = torch.empty(segments.count, segments.longest)
        result = find_similar(segments, keys, threshold=near, limit=forgive)
        with counted({"keys": keys.storages, "out": out}) as counts:
            forgiven_similarity(segments, keys, threshold=near, forgive=forgive, empty_row=empty_row, out=out)
        pairs = pairs_of(result.targets, lengths, empty_row)
        planned = traffic(segments, lengths, keys, forgive=forgive, compared=int(result.compared.sum()), pairs=pairs)
        assert counts.read["keys"] == planned.read["keys"]
        assert counts.written["out"] == planned.written["out"]
        most = traffic(segments, lengths, keys, forgive=forgive)
        assert most.read["keys"] >= planned.read["keys"]
        assert most.launches == 4
