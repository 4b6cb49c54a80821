"""Scores and their postprocessing where slots are protected by a label, beside sinks and recent entries."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy_kernels import Postprocess, Tile, UnsupportedInputError, WindowUse
from kvpolicy_kernels.score import launch_config
from kvpolicy_kernels.score import score as score_launcher
from kvpolicy_kernels.score import statistics as statistics_launcher
from kvpolicy_kernels.score.postprocess import postprocess
from kvpolicy_kernels.score.postprocess import traffic as postprocess_traffic
from kvpolicy_kernels.score.tiles.attention import SCORES, attention_votes
from tests.kernels.accuracy import assert_twice_as_good
from tests.kernels.counting import counted
from tests.kernels.outputs import Guarded
from tests.kernels.references import scoring
from tests.kernels.references.postprocess import finished
from tests.kernels.references.situations import situation
from tests.kernels.scenes import DEVICE, LABELS, label, scene
from tests.support.examples import examples

LENGTHS = st.sampled_from((0, 1, 2, 5, 20, 63, 64, 65, 127, 129))
FINISHES = st.builds(
    Postprocess,
    softmax=st.booleans(),
    pool=st.sampled_from(("none", "max", "average")),
    size=st.sampled_from((1, 3, 7)),
    shared=st.booleans(),
    normalise=st.sampled_from(("none", "max", "standard")),
    weight=st.sampled_from((1.0, -0.9, 0.0)),
)
OF_CANDIDATES = WindowUse(4, "candidates")
VOTES = Tile(attention_votes, (SCORES, 0, 0, 0), (0.0,), window=OF_CANDIDATES, keys=False)


@pytest.fixture(autouse=True)
def _numpy_is_silent():
    with np.errstate(all="ignore"):  # inf and NaN are meant here, and the interpreter computes with NumPy
        yield


def check(lengths, settings, labels, terms=None, *, sinks=2, recent=3, seed=0, capacity=None):
    """The kernels are as near to float64 as float32 torch is, and count the same NaN."""
    made = scene(torch.tensor(lengths), 16, torch.float32, seed=seed, capacity=capacity)
    segments, longest = made.segments, made.segments.longest
    if terms is None:
        terms = torch.randn(len(settings), segments.count, longest, generator=torch.Generator().manual_seed(seed))
    pinned, out = label(labels, segments, seed), Guarded((segments.count, longest), torch.float32, DEVICE)
    protect = {"sinks": sinks, "recent": recent, "pinned": pinned}
    total, nan = postprocess(segments, made.columns["positions"], terms.to(DEVICE), settings, **protect, out=out.tensor)
    out.check()
    candidates = torch.zeros(segments.count, longest, dtype=torch.bool)
    for row, places, label_of_row in zip(candidates, made.lists("positions"), pinned.cpu(), strict=True):
        free = max(0, len(places) - recent)
        row[:free] = (places.cpu() >= sinks)[:free] & ~label_of_row[:free]
    (exact, wrong), (single, _) = (
        finished(terms.to(kind), segments.lengths.cpu(), candidates, settings, segments.heads)
        for kind in (torch.float64, torch.float32)
    )
    assert_twice_as_good(total.cpu(), single, exact)
    assert nan.tolist() == wrong.tolist()


@settings(max_examples=examples(10))
@given(
    st.lists(FINISHES, min_size=1, max_size=3),
    st.lists(LENGTHS, min_size=4, max_size=4),
    st.sampled_from(LABELS),
    st.integers(0, 99),
)
def test_any_finishes_of_ragged_heads_with_any_label(settings, lengths, labels, seed):
    check([[lengths[:2], lengths[2:]]], settings, labels, seed=seed, sinks=seed % 4, recent=seed % 5)


@pytest.mark.parametrize("labels", ["some", "heads"])
@pytest.mark.parametrize("normalise", ["max", "standard"])
@pytest.mark.parametrize("pool", ["none", "max", "average"])
def test_sums_over_several_programs(normalise, pool, labels):
    settings = [Postprocess(softmax=normalise == "max", pool=pool, size=5, normalise=normalise)]
    check([[[1100, 513]], [[0, 512]]], settings, labels, capacity=1200)


@pytest.mark.parametrize("normalise", ["none", "max", "standard"])
@pytest.mark.parametrize("pool", ["none", "max", "average"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_score_of_a_protected_slot_that_is_no_number_reaches_no_candidate(wrong, pool, normalise):
    terms = torch.randn(1, 2, 40, generator=torch.Generator().manual_seed(3))
    segments = scene(torch.tensor([[[40, 40]]]), 16, torch.float32).segments
    terms[0, :, :] = terms[0].masked_fill(label("some", segments).cpu(), wrong)
    check([[[40, 40]]], [Postprocess(pool=pool, size=3, normalise=normalise)], "some", terms)


@pytest.mark.parametrize("pool", ["none", "max", "average"])
def test_a_candidate_that_is_nan_is_counted(pool):
    terms = torch.randn(1, 4, 40, generator=torch.Generator().manual_seed(3))
    terms[0, 1, 7:20] = torch.nan
    check([[[40, 40], [40, 40]]], [Postprocess(pool=pool, size=3, normalise="standard")], "some", terms)


@settings(max_examples=examples(10))
@given(
    st.lists(LENGTHS, min_size=4, max_size=4),
    st.sampled_from(LABELS),
    st.sampled_from((torch.float32, torch.bfloat16)),
    st.integers(0, 99),
)
def test_window_queries_see_candidates_only(lengths, labels, dtype, seed):
    """Log-sum-exps and probabilities of a softmax over candidates leave labelled slots out."""
    shape = {"group": 1 + seed % 4, "votes": seed % 2 == 0, "pinned": labels}
    given_ = situation([[lengths[:2]], [lengths[2:]]], 16, dtype, **shape, seed=seed)
    segments, columns, window = given_.scene.segments, given_.scene.columns, given_.window
    use = attended = (4, "candidates", True, "none")
    found = statistics_launcher.statistics(segments, columns, window, [OF_CANDIDATES], [], **given_.protect).lse
    scored = score_launcher.scores(segments, columns, window, [VOTES], [None], **given_.protect)[0]
    pairs = zip(scoring.heads(given_), scoring.heads(given_, torch.float32), strict=True)
    for place, (exact, single) in enumerate(pairs):
        wanted = scoring.log_sum_exp(exact, *use)
        lse = found[place, 0].cpu()[: wanted.shape[0], -wanted.shape[1] :]
        assert_twice_as_good(lse, scoring.log_sum_exp(single, *use), wanted)
        votes, naive = (votes_of(head, attended) for head in (exact, single))
        assert_twice_as_good(scored[place, : len(votes)].cpu(), naive, votes)


def votes_of(head, use):
    voters = (head.query_positions[-4:] >= 0).sum().clamp(min=1)
    return scoring.probabilities(head, *use).sum(1).mean(0) / voters


@pytest.mark.parametrize("busy", [2, 528])
@pytest.mark.parametrize("use", [OF_CANDIDATES, WindowUse(4)])
def test_bytes_of_scores_are_what_traffic_says(use, busy, monkeypatch):
    """A label that no use asks for is not read."""
    monkeypatch.setattr(launch_config, "_CONCURRENT_PROGRAMS", busy)
    lengths = [[[200, 70], [0, 65]], [[1, 64], [128, 129]]]
    given_ = situation(lengths, pinned="some")
    segments, columns, window = given_.scene.segments, given_.scene.columns, given_.window
    tile = Tile(attention_votes, (SCORES, 0, 0, 0), (0.0,), window=use, keys=False)
    named = {name: columns[name].storages for name in ("keys", "positions")}
    out = torch.empty(1, 8, 200)
    with counted({**named, "queries": window.queries, "scores": out, "pinned": given_.protect["pinned"]}) as seen:
        score_launcher.scores(segments, columns, window, [tile], [None], **given_.protect, out=out)
    flat = torch.tensor(lengths).flatten().tolist()
    said = score_launcher.traffic(segments, columns, window, [tile], flat, pinned=True)
    assert (seen.read, seen.written) == (said.read, said.written)
    assert ("pinned" in seen.read) == (use is OF_CANDIDATES)


@pytest.mark.parametrize(
    "settings",
    [
        [Postprocess()],
        [Postprocess(softmax=True, normalise="max"), Postprocess(pool="max", size=7)],
        [Postprocess(pool="average", size=5, shared=True, normalise="standard"), Postprocess(weight=0.5)],
    ],
)
@pytest.mark.parametrize("labels", ["none", "some", "all"])
def test_bytes_of_postprocessing_are_what_traffic_says(settings, labels):
    lengths = torch.tensor([[[600, 20], [0, 129]]])
    made = scene(lengths, 16, torch.float32)
    for place, length in enumerate(lengths.flatten().tolist()):  # no gaps: every sink is held
        start = int(made.segments.starts[place])
        made.columns["positions"].storages[0][start : start + length] = torch.arange(length)
    terms, out, pinned = torch.randn(len(settings), 4, 600), torch.empty(4, 600), label(labels, made.segments)
    protect = {"sinks": 4, "recent": 7}
    named = {"terms": terms, "scores": out, "positions": made.columns["positions"].storages, "pinned": pinned}
    with counted(named) as seen:
        postprocess(made.segments, made.columns["positions"], terms, settings, **protect, pinned=pinned, out=out)
    said = postprocess_traffic(settings, lengths.flatten().tolist(), 600, heads=2, **protect, pinned=True)
    assert (seen.read, seen.written) == (said.read, said.written)


def test_labels_that_kernels_cannot_read_are_refused():
    given_ = situation([[[9, 8]]])
    segments, columns = given_.scene.segments, given_.scene.columns
    good, out = label("some", segments), torch.full((1, 2, 9), 7.0, device=DEVICE)
    parts = (segments, columns, given_.window, [VOTES], [None])
    for bad in (good.int(), good[:, :8], good[:1], good.T.contiguous().T):
        with pytest.raises(UnsupportedInputError, match="pinned"):
            score_launcher.scores(*parts, **given_.protect, pinned=bad, out=out)
        with pytest.raises(UnsupportedInputError, match="pinned"):
            statistics_launcher.statistics(*parts[:3], [OF_CANDIDATES], [], **given_.protect, pinned=bad)
        with pytest.raises(UnsupportedInputError, match="pinned"):
            postprocess(segments, columns["positions"], out, [Postprocess()], **given_.protect, pinned=bad)
    assert (out == 7).all()
