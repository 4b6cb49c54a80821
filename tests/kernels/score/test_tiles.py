"""Every built-in scorer's tile, fused and finished, gives what the scorer itself gives, run in float64."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy_kernels import Postprocess, Tile
from kvpolicy_kernels.score.postprocess import postprocess
from kvpolicy_kernels.score.score import scores
from kvpolicy_kernels.score.tile import ColumnRequest
from kvpolicy_plugins.scorers.attention_based.accumulated_attention import AccumulatedAttention
from kvpolicy_plugins.scorers.attention_based.attention import Attention
from kvpolicy_plugins.scorers.attention_free.key_norm import KeyNorm
from kvpolicy_plugins.scorers.attention_free.keydiff import KeyDiff
from kvpolicy_plugins.scorers.attention_free.redundancy import Redundancy
from kvpolicy_plugins.scorers.attention_free.value_norm import ValueNorm
from kvpolicy_plugins.scorers.history import History
from kvpolicy_plugins.scorers.recency import Recency
from kvpolicy_plugins.scorers.shared.pooling import Pool
from tests.kernels.accuracy import assert_twice_as_good
from tests.kernels.references.postprocess import finished
from tests.kernels.references.situations import situation
from tests.kernels.scenes import DEVICE
from tests.support.examples import examples

GROUPS = ("mean", "max", "sum")
POOLS = st.builds(Pool, kind=st.sampled_from(("none", "max", "average")), size=st.sampled_from((1, 3, 7)))
ATTENTION = st.builds(
    Attention,
    queries=st.sampled_from((1, 3, 8)),
    softmax=st.sampled_from(("all", "candidates")),
    group=st.sampled_from(GROUPS),
    group_at=st.sampled_from(("logits", "probabilities", "scores", "pooled")),
    reduce=st.sampled_from(("mean", "sum")),
    pool=POOLS,
    deviation=st.sampled_from((0.0, 2.5)),
    spread=st.sampled_from(("deviation", "variance")),
    causal=st.booleans(),
    shared=st.booleans(),
)
REDUNDANCY = st.builds(
    Redundancy,
    threshold=st.sampled_from((0.0, 0.2, 0.5)),
    forgive=st.sampled_from((0, 1, 2)),
    forgive_end=st.sampled_from(("last", "first")),
    empty_row=st.sampled_from(("slot0", "none")),
)
OTHERS = st.one_of(
    st.just(KeyNorm()),
    st.just(KeyDiff()),
    st.just(Recency()),
    st.builds(ValueNorm, order=st.sampled_from((1, 2, 3.0, 0.5, 7.5))),
    st.builds(AccumulatedAttention, group=st.sampled_from(GROUPS)),
)
LENGTHS = st.sampled_from((0, 1, 2, 5, 20, 63, 64, 65, 90))


@pytest.fixture(autouse=True)
def _numpy_is_silent():
    with np.errstate(all="ignore"):
        yield


def fused(scorer, given, normalise, weight):
    """[P, T] as the kernels compute it."""
    tile = scorer.tile()
    assert isinstance(tile, Tile), tile
    segments, columns = given.scene.segments, given.scene.columns
    column = None
    if tile.column is not None:
        column = tile.column(ColumnRequest(segments, columns["keys"], columns["values"], columns["positions"]))
    window = given.window if tile.window is not None else None
    terms = scores(segments, columns, window, [tile], [column], **given.protect)
    last = Postprocess(**{name: getattr(tile.postprocess, name) for name in ("softmax", "pool", "size", "shared")})
    last = Postprocess(last.softmax, last.pool, last.size, last.shared, normalise, weight)
    total, _ = postprocess(segments, columns["positions"], terms, [last], **given.protect)
    return total.cpu()


def by_plugin(scorer, given, normalise, weight, dtype):
    """[P, T] as the scorer computes it from views, in float32 or, with every `float()` a `double()`, in float64."""
    convert = torch.Tensor.float if dtype == torch.float32 else torch.Tensor.double
    views = given.views(dtype)
    as_it_is = mock.patch("kvpolicy.stages.products._product_dtype", lambda keys: keys.dtype)
    with mock.patch.object(torch.Tensor, "float", convert), as_it_is:
        raw = torch.cat([scorer.score(view).flatten(0, 1) for view in views]).to(dtype)
    candidates = torch.cat([view.candidates.flatten(0, 1) for view in views])
    last = Postprocess(normalise=normalise, weight=weight)
    lengths = given.scene.segments.lengths.cpu()
    everywhere = torch.full_like(lengths, raw.shape[1])  # what a scorer says of empty slots is void, but not 0
    total, _ = finished(raw[None], everywhere, candidates, [last], given.scene.segments.heads)
    return total


def check(scorer, given, normalise="none", weight=1.0):
    exact = by_plugin(scorer, given, normalise, weight, torch.float64)
    single = by_plugin(scorer, given, normalise, weight, torch.float32)
    assert_twice_as_good(fused(scorer, given, normalise, weight), single, exact)


def place(lengths, seed, dtype):
    shape = {"group": (1, 2, 3, 4)[seed % 4], "width": (8, 5, 1)[seed % 3], "votes": seed % 2 == 0}
    protect = {"sinks": seed % 5, "recent": seed % 7}
    return situation([[lengths[:2]], [lengths[2:]]], (16, 59, 32)[seed % 3], dtype, **shape, **protect, seed=seed)


COMMON = (
    st.lists(LENGTHS, min_size=4, max_size=4),
    st.integers(0, 209),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    st.sampled_from(("none", "max", "standard")),
    st.sampled_from((1.0, -0.9)),
)


@settings(max_examples=examples(24))
@given(ATTENTION, *COMMON)
def test_attention(scorer, lengths, seed, dtype, normalise, weight):
    if isinstance(scorer.tile(), str):
        assert scorer.group_at == "pooled"
        return
    if scorer.shared:  # heads of a row that keep one set have equal lengths
        lengths = [lengths[0], lengths[0], lengths[1], lengths[1]]
    check(scorer, place(lengths, seed, dtype), normalise, weight)


@settings(max_examples=examples(20))
@given(OTHERS, *COMMON)
def test_others(scorer, lengths, seed, dtype, normalise, weight):
    check(scorer, place(lengths, seed, dtype), normalise, weight)


@settings(max_examples=examples(6))
@given(REDUNDANCY, *COMMON)
def test_redundancy(scorer, lengths, seed, dtype, normalise, weight):
    check(scorer, place(lengths, seed, dtype), normalise, weight)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", ["none", "max", "average"])
def test_reasons_against_a_tile(group, kind):
    """Pooling each query head apart is only the same as pooling their sum when the two commute."""
    scorer = Attention(queries=4, group=group, group_at="pooled", pool=Pool(kind=kind, size=3))
    if (kind == "max") != (group == "max") and kind != "none":
        assert scorer.tile() == "pools each query head separately"
    else:
        check(scorer, place([20, 5, 65, 1], 2, torch.float32))


@pytest.mark.parametrize("group", GROUPS)
def test_mass_of_every_query_head_counts_without_a_window(group):
    check(AccumulatedAttention(group=group), situation([[[20, 5]]], group=3))


def test_what_remembers_has_no_tile():
    assert History(of=Attention()).tile() == "combines scores over time"


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e6])
@pytest.mark.parametrize("order", [0.5, 1, 2, 3, 30])
def test_norms_of_any_size(order, scale):
    given = situation([[[20, 3]]])
    for storage in given.scene.columns["values"].storages:
        storage.mul_(scale)
    if order == 30 and scale:  # torch overflows or underflows to 0 there
        exact = torch.stack([torch.linalg.vector_norm(one.double(), ord=30, dim=1) for one in (_first(given),)])[0]
        found = scores(
            given.scene.segments, given.scene.columns, None, [ValueNorm(order=30).tile()], [None], sinks=0, recent=0
        )
        torch.testing.assert_close(found[0, 0].double().cpu(), exact, rtol=2e-6, atol=0)
    else:
        check(ValueNorm(order=order), given)


def _first(given):
    return given.scene.lists("values")[0].to(DEVICE).cpu()
