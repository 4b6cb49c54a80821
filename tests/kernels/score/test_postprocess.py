"""The postprocessing kernels against loops in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy_kernels import Postprocess, UnsupportedInputError
from kvpolicy_kernels.score.postprocess import postprocess, traffic
from tests.kernels.accuracy import assert_twice_as_good
from tests.kernels.counting import counted
from tests.kernels.outputs import Guarded
from tests.kernels.references.postprocess import finished
from tests.kernels.scenes import DEVICE, scene
from tests.support.examples import examples

LENGTHS = st.sampled_from((0, 1, 2, 5, 20, 63, 64, 65, 127, 129))
FINISHES = st.builds(
    Postprocess,
    softmax=st.booleans(),
    pool=st.sampled_from(("none", "max", "average")),
    size=st.sampled_from((1, 3, 7)),
    shared=st.booleans(),
    normalise=st.sampled_from(("none", "max", "standard")),
    weight=st.sampled_from((1.0, -0.9, 0.1, 0.0)),
)


@pytest.fixture(autouse=True)
def _numpy_is_silent():
    with np.errstate(all="ignore"):  # inf and NaN are meant here, and the interpreter computes with NumPy
        yield


def run(lengths, settings, terms=None, *, sinks=2, recent=3, seed=0, capacity=None):
    """Terms, what the kernels make of them, and what they should in float64 and in float32."""
    made = scene(torch.tensor(lengths), 16, torch.float32, seed=seed, capacity=capacity)
    segments, longest = made.segments, made.segments.longest
    if terms is None:
        terms = torch.randn(len(settings), segments.count, longest, generator=torch.Generator().manual_seed(seed))
    out = Guarded((segments.count, longest), torch.float32, DEVICE)
    positions = made.columns["positions"]
    total, nan = postprocess(
        segments, positions, terms.to(DEVICE), settings, sinks=sinks, recent=recent, out=out.tensor
    )
    out.check()
    candidates = torch.zeros(segments.count, longest, dtype=torch.bool)
    for row, places in zip(candidates, made.lists("positions"), strict=True):
        row[: max(0, len(places) - recent)] = (places >= sinks).cpu()[: max(0, len(places) - recent)]
    references = [
        finished(terms.to(kind), segments.lengths.cpu(), candidates, settings, segments.heads)
        for kind in (torch.float64, torch.float32)
    ]
    return total.cpu(), nan.cpu(), *references


def check(*given, **named):
    total, nan, (exact, wrong), (single, _) = run(*given, **named)
    assert_twice_as_good(total, single, exact)
    assert nan.dtype == torch.int32
    assert nan.tolist() == wrong.tolist()


@settings(max_examples=examples(12))
@given(st.lists(FINISHES, min_size=1, max_size=3), st.lists(LENGTHS, min_size=4, max_size=4), st.integers(0, 99))
def test_any_finishes_of_ragged_heads(settings, lengths, seed):
    check([[lengths[:2], lengths[2:]]], settings, seed=seed, sinks=seed % 4, recent=seed % 5)


@pytest.mark.parametrize("normalise", ["max", "standard"])
@pytest.mark.parametrize("pool", ["none", "max", "average"])
def test_sums_over_several_programs(normalise, pool):
    settings = [Postprocess(softmax=normalise == "max", pool=pool, size=5, normalise=normalise)]
    check([[[1100, 513]], [[0, 512]]], settings, capacity=1200)


def test_shared_over_the_heads_of_each_row():
    check([[[70, 70, 70], [20, 20, 20]]], [Postprocess(pool="average", size=3, shared=True, weight=2.0)])


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf, -0.0, 1e-42])
@pytest.mark.parametrize("normalise", ["none", "max", "standard"])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("pool", ["none", "max", "average"])
def test_what_is_no_ordinary_number_stays_in_its_head(wrong, normalise, softmax, pool):
    terms = torch.randn(2, 4, 40, generator=torch.Generator().manual_seed(3))
    terms[0, 1, 10] = wrong
    terms[0, 2, 39] = wrong  # recent, no candidate
    settings = [Postprocess(softmax=softmax, pool=pool, size=3, normalise=normalise), Postprocess(weight=0.5)]
    check([[[40, 40], [40, 40]]], settings, terms)


@pytest.mark.parametrize("normalise", ["none", "max", "standard"])
@pytest.mark.parametrize("value", [0.0, 1.5, -2.0])
def test_equal_scores(normalise, value):
    check([[[40, 3]]], [Postprocess(pool="max", size=7, normalise=normalise)], torch.full((1, 2, 40), value))


@pytest.mark.parametrize(
    "protect", [{"sinks": 0, "recent": 0}, {"sinks": 500, "recent": 0}, {"sinks": 0, "recent": 99}]
)
def test_everything_or_nothing_is_protected(protect):
    check([[[40, 3]]], [Postprocess(pool="max", size=7, normalise="standard"), Postprocess(softmax=True)], **protect)


@pytest.mark.parametrize(
    "settings",
    [
        [Postprocess()],
        [Postprocess(softmax=True, normalise="max"), Postprocess(pool="max", size=7)],
        [Postprocess(pool="average", size=5, shared=True, normalise="standard"), Postprocess(weight=0.5)],
    ],
)
def test_bytes_are_what_traffic_says(settings):
    lengths = torch.tensor([[[600, 20], [0, 129]]])
    made = scene(lengths, 16, torch.float32)
    for place, length in enumerate(lengths.flatten().tolist()):  # no gaps: every sink is held
        start = int(made.segments.starts[place])
        made.columns["positions"].storages[0][start : start + length] = torch.arange(length)
    terms = torch.randn(len(settings), 4, 600)
    out = torch.empty(4, 600)
    with counted({"terms": terms, "scores": out, "positions": made.columns["positions"].storages}) as seen:
        postprocess(made.segments, made.columns["positions"], terms, settings, sinks=4, recent=7, out=out)
    said = traffic(settings, lengths.flatten().tolist(), 600, heads=2, sinks=4, recent=7)
    assert (seen.read, seen.written) == (said.read, said.written)


def test_guards_refuse_before_anything_is_written():
    made = scene(torch.tensor([[[9, 9]]]), 16, torch.float32)
    good = {"segments": made.segments, "positions": made.columns["positions"]}
    good |= {"terms": torch.randn(1, 2, 9, device=DEVICE), "settings": [Postprocess()], "sinks": 0, "recent": 0}
    bad = [
        {"terms": torch.randn(1, 2, 9, dtype=torch.float64, device=DEVICE)},
        {"terms": torch.randn(2, 2, 9, device=DEVICE)},
        {"terms": torch.randn(1, 9, 2, device=DEVICE).transpose(1, 2)},
        {"settings": [Postprocess(pool="median")]},
        {"settings": [Postprocess(pool="max", size=4)]},
        {"settings": []},
        {"positions": made.columns["keys"]},
        {"sinks": -1},
        {"sinks": 5000},
    ]
    for one in bad:
        out = torch.full((2, 9), 7.0, device=DEVICE)
        with pytest.raises(UnsupportedInputError):
            postprocess(**{**good, **one}, out=out)
        assert (out == 7).all()


@pytest.mark.parametrize(("slots", "dtype"), [(8, torch.float32), (9, torch.float16)])
def test_guards_refuse_wrong_outputs(slots, dtype):
    out = torch.empty(2, slots, dtype=dtype, device=DEVICE)
    made = scene(torch.tensor([[[9, 9]]]), 16, torch.float32)
    terms = torch.randn(1, 2, 9, device=DEVICE)
    with pytest.raises(UnsupportedInputError, match="scores"):
        postprocess(made.segments, made.columns["positions"], terms, [Postprocess()], sinks=0, recent=0, out=out)
