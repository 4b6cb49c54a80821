"""Log-sum-exps of the window's queries and sums over entries, against float64."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl  # noqa: F401 the interpreter looks for it in modules of jit functions
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy_kernels import UnsupportedInputError, WindowUse
from kvpolicy_kernels.score import launch_config
from kvpolicy_kernels.score.statistics import statistics, traffic
from kvpolicy_kernels.score.tiles.redundancy import directions
from tests.kernels.accuracy import assert_twice_as_good
from tests.kernels.counting import counted
from tests.kernels.references import scoring
from tests.kernels.references.situations import situation
from tests.support.examples import examples

USES = st.builds(
    WindowUse,
    queries=st.sampled_from((1, 3, 4, 9)),
    region=st.sampled_from(("all", "candidates")),
    causal=st.booleans(),
    group=st.sampled_from(("none", "mean", "max", "sum")),
)
LENGTHS = st.sampled_from((0, 1, 2, 5, 63, 64, 65, 127, 129))


@triton.jit
def squares(keys):
    return keys * keys


@pytest.fixture(autouse=True)
def _numpy_is_silent():
    with np.errstate(all="ignore"):  # inf and NaN are meant in some tests, and the interpreter computes with NumPy
        yield


def found_in(given, uses, functions):
    return statistics(given.scene.segments, given.scene.columns, given.window, uses, functions, **given.protect)


def check(given, uses, functions):
    """Every head of every use and function is as near to float64 as float32 torch is."""
    found = found_in(given, uses, functions)
    pairs = zip(scoring.heads(given), scoring.heads(given, torch.float32), strict=True)
    for place, (exact, single) in enumerate(pairs):
        for own, use in zip(found.lse[place].cpu(), uses, strict=True):
            known = (use.queries, use.region, use.causal, use.group)
            wanted = scoring.log_sum_exp(exact, *known)
            lse = own[: wanted.shape[0], -wanted.shape[1] :]
            assert_twice_as_good(lse, scoring.log_sum_exp(single, *known), wanted)
        for own, function in zip(found.sums[place].cpu(), functions, strict=True):
            naive = scoring.directions if function is directions else lambda head: head.keys**2
            assert_twice_as_good(own, naive(single).sum(0), naive(exact).sum(0))


@settings(max_examples=examples(10))
@given(
    st.lists(USES, max_size=2, unique=True),
    st.sampled_from(((), (directions,), (squares, directions))),
    st.lists(LENGTHS, min_size=4, max_size=4),
    st.sampled_from((16, 59, 80)),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    st.integers(0, 99),
)
def test_any_uses_of_ragged_heads(uses, functions, lengths, dim, dtype, seed):
    if not uses and not functions:
        functions = (squares,)
    shape = {"group": 1 + seed % 4, "width": (1, 4, 5)[seed % 3], "votes": seed % 2 == 0}
    check(situation([[lengths[:2]], [lengths[2:]]], dim, dtype, **shape, seed=seed), uses, functions)


@pytest.mark.parametrize("busy", [2, 10, 528])
@pytest.mark.parametrize("use", [WindowUse(4), WindowUse(4, "candidates", False, "max")])
def test_parts_of_a_head_are_joined(use, busy, monkeypatch):
    monkeypatch.setattr(launch_config, "_CONCURRENT_PROGRAMS", busy)  # a program takes up to all blocks of a head
    check(situation([[[700, 130], [0, 65]]], capacity=700, votes=True), [use], [directions])


@pytest.mark.parametrize("use", [WindowUse(33, "candidates"), WindowUse(33, group="mean")])
def test_many_queries_take_smaller_blocks(use):
    """More than 128 queries of a group, which is padded to four heads."""
    check(situation([[[70, 33]]], group=3, width=33), [use], [])


@pytest.mark.parametrize("busy", [1, 528])
@pytest.mark.parametrize("scale", [1e-3, 40.0, 3e3])
def test_far_maxima(scale, busy, monkeypatch):
    """Logits rise by more than 2^64 from block to block, of one program and of several."""
    monkeypatch.setattr(launch_config, "_CONCURRENT_PROGRAMS", busy)
    given = situation([[[200, 70]]], seed=5)
    for storage in given.scene.columns["keys"].storages:
        storage.mul_(scale * torch.linspace(0, 1, len(storage), device=storage.device)[:, None])
    check(given, [WindowUse(4), WindowUse(4, causal=False)], [])


def test_a_query_that_sees_nothing_has_no_sum():
    given = situation([[[20, 3]]])
    given.query_positions[0][0, :2] = -1
    found = found_in(given, [WindowUse(4)], [])

    assert (found.lse[..., -4:-2] == -torch.inf).all()
    assert found.lse[..., -2:].isfinite().all()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_no_number_stays_in_its_head(wrong):
    given = situation([[[20, 20], [20, 20]]])
    start = int(given.scene.segments.starts[1])
    given.scene.columns["keys"].storages[0][start + 7, 3] = wrong
    found = found_in(given, [WindowUse(4, causal=False)], [squares])

    wanted = [scoring.log_sum_exp(head, 4, "all", False, "none") for head in scoring.heads(given)]
    assert torch.equal(found.lse[1, 0, :2, -4:].isfinite().cpu(), wanted[1].isfinite())
    assert found.lse[[0, 2, 3]].isnan().sum() == 0
    assert found.sums[[0, 2, 3]].isfinite().all()
    assert not found.sums[1, 0, 3].isfinite()


@pytest.mark.parametrize("uses", [[], [WindowUse(4)]])
@pytest.mark.parametrize("functions", [[directions], [squares, directions]])
def test_bytes_are_what_traffic_says(uses, functions):
    lengths = [[[200, 70], [0, 65]], [[1, 64], [128, 129]]]
    given = situation(lengths, votes=True)
    window, columns = given.window, given.scene.columns
    named = {name: columns[name].storages for name in ("keys", "positions", "log_votes")}
    with counted({**named, "queries": window.queries}) as seen:
        statistics(given.scene.segments, columns, window, uses, functions, **given.protect)
    flat = torch.tensor(lengths).flatten().tolist()
    said = traffic(given.scene.segments, columns, window, uses, functions, flat)
    assert (seen.read, seen.written) == (said.read, said.written)


def test_nothing_to_do_is_refused():
    given = situation([[[5, 5]]])
    with pytest.raises(UnsupportedInputError, match="nothing"):
        found_in(given, [], [])


@pytest.mark.parametrize("use", [WindowUse(0), WindowUse(4, "some"), WindowUse(4, group="median")])
def test_unknown_uses_are_refused(use):
    with pytest.raises(UnsupportedInputError, match="unknown"):
        found_in(situation([[[5, 5]]]), [use], [])
