"""Window attention at its edges."""

import attrs
import pytest
import torch
from torch.testing import assert_close

from kvpolicy.stages import products
from kvpolicy.stages import view as stages_view
from kvpolicy_plugins.scorers.attention_based.attention import Attention
from kvpolicy_plugins.scorers.shared.pooling import Pool
from tests.kernels.accuracy import assert_twice_as_good
from tests.support.views import view_of


@pytest.fixture
def view():
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 2, 12, 16, generator=random)
    return view_of(keys, queries=torch.randn(2, 4, 6, 16, generator=random), recent=3)


def test_only_the_last_queries_vote(view):
    last = attrs.evolve(view, queries=view.queries[:, :, -2:])
    assert_close(Attention(2).score(view), Attention(2).score(last))


def test_a_row_with_fewer_queries_averages_over_its_own(view):
    positions = torch.tensor([[6, 7, 8, 9, 10, 11], [-1, -1, -1, -1, 10, 11]])
    padded = attrs.evolve(view, query_positions=positions)
    junk = view.queries.clone()
    junk[1, :, :4] = torch.nan
    found = Attention(6).score(attrs.evolve(padded, queries=junk))
    assert_close(found[0], Attention(6).score(view)[0])
    assert_close(found[1], Attention(2).score(view)[1])


def test_a_query_does_not_see_what_came_after_it(view):
    early = attrs.evolve(view, query_positions=torch.full((2, 6), 5))
    assert (Attention(6).score(early)[..., 6:] == 0).all()
    assert (Attention(6, causal=False).score(early)[..., 6:] > 0).all()


def test_a_query_that_sees_no_candidate_gives_nothing(view):
    first = attrs.evolve(view, query_positions=torch.zeros(2, 6, dtype=torch.int64), sinks=1)
    assert (Attention(6, softmax="candidates").score(first) == 0).all()


def test_one_query_has_no_deviation(view):
    assert_close(Attention(1, deviation=5).score(view), Attention(1).score(view))


@pytest.mark.parametrize("softmax", ["all", "candidates"])
def test_all_queries_of_a_kv_head_are_reduced_alike(view, softmax):
    """The largest and the root mean square, over queries and query heads; a row with two queries has these alone."""
    places = torch.tensor([[6, 7, 8, 9, 10, 11], [-1, -1, -1, -1, 10, 11]])
    padded = attrs.evolve(view, query_positions=places)
    logits = padded.logits.masked_fill(view.positions[:, :, None, None] > places[:, None, None, :, None], -torch.inf)
    if softmax == "candidates":
        logits = logits.masked_fill(~view.candidates[:, :, None, None], -torch.inf)
    for row, first in ((0, 0), (1, 4)):
        probabilities = logits[row, :, :, first:].softmax(-1)
        largest, rms = (Attention(6, softmax, how, reduce=how).score(padded)[row] for how in ("max", "rms"))
        inside = view.candidates[row]
        assert_close(largest[inside], probabilities.amax((1, 2))[inside])
        assert_close(rms[inside], probabilities.square().mean((1, 2)).sqrt()[inside])


def test_pooling_sees_candidates_only():
    scores = torch.tensor([[9.0, 1, 2, 3, 9]])
    inside = torch.tensor([[False, True, True, True, False]])
    assert Pool("max", 3)(scores, inside)[0, 1:4].tolist() == [2, 3, 3]
    assert Pool("average", 3)(scores, inside)[0, 1:4].tolist() == pytest.approx([1, 2, 5 / 3])
    assert Pool("none", 3)(scores, inside) is scores


def test_the_scaling_of_the_model_counts(view):
    sharper = attrs.evolve(view, scaling=view.scaling * 3)
    tripled = attrs.evolve(view, queries=view.queries * 3)
    assert_close(Attention(6).score(sharper), Attention(6).score(tripled))


def in_dtype(view, dtype):
    """SnapKV's score in one dtype: [B, K, T], with float32 probabilities where the dtype is narrower."""
    queries = view.queries.to(dtype).unflatten(1, (view.keys.shape[1], -1))
    logits = queries @ view.keys.to(dtype)[:, :, None].transpose(-1, -2) * view.scaling
    later = view.positions[:, :, None, None] > view.window_positions[:, None, None, :, None]
    wide = torch.promote_types(dtype, torch.float32)
    return logits.masked_fill(later, -torch.inf).softmax(-1, dtype=wide).mean(3).mean(2)


@pytest.mark.parametrize("slots", [63, 65, 700])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_at_most_twice_that_of_the_same_dtype(dtype, native, slots, monkeypatch):
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda device: native)
    random = torch.Generator().manual_seed(slots)
    keys, queries = torch.randn(2, 2, slots, 64, generator=random), torch.randn(2, 6, 9, 64, generator=random)
    narrow = view_of(keys.to(dtype), queries=2 * queries.to(dtype))
    exact = in_dtype(narrow, torch.float64)
    assert_twice_as_good(Attention(9).score(narrow), in_dtype(narrow, dtype), exact)


@pytest.mark.parametrize("softmax", ["all", "candidates"])
@pytest.mark.parametrize("group_at", ["logits", "probabilities", "scores", "pooled"])
def test_heads_are_scored_alike_one_by_one_or_together(view, group_at, softmax, monkeypatch):
    scorer = Attention(4, softmax=softmax, group_at=group_at, group="max", deviation=1.0, pool=Pool("max", 3))
    view = attrs.evolve(view, log_votes=torch.rand(view.positions.shape), sinks=2)
    together = scorer.score(view)
    for most in (1, 2 * 4 * 12 * 3):  # logits of one head, and of three out of four
        monkeypatch.setattr(stages_view, "_LOGITS", most)
        assert_close(scorer.score(view), together, atol=1e-6, rtol=1e-5)


def test_empty_slots_may_hold_anything(view):
    lengths = torch.tensor([[12, 7], [5, 5]])
    positions = view.positions.where(view.positions < lengths[..., None], -1)
    short = attrs.evolve(view, positions=positions, query_positions=torch.arange(6, 12).expand(2, 6))
    junk = view.keys.masked_fill((positions < 0)[..., None], torch.nan)
    assert_close(Attention(6).score(attrs.evolve(short, keys=junk)), Attention(6).score(short))


def test_every_head_has_votes_of_its_own(view):
    voted = attrs.evolve(view, log_votes=torch.rand(view.positions.shape).log())
    later = view.positions[:, :, None, None] > view.window_positions[:, None, None, :, None]
    expected = voted.logits.masked_fill(later, -torch.inf).softmax(-1).mean(3).mean(2)
    assert_close(Attention(6).score(voted), expected)


def alike(**rest):
    """Keys that every query attends to alike."""
    return view_of(torch.zeros(2, 2, 10, 4), queries=torch.zeros(2, 4, 4, 4), **rest)


def test_by_length_undoes_what_more_entries_share():
    """Each query sees one entry more than there are before it, and gives 1 / (n + 1) to each: n / (n + 1) is left."""
    scores = Attention(4, by_length=True).score(alike())
    expected = sum(before / (before + 1) for before in (6, 7, 8, 9)) / 4
    assert_close(scores[..., :7], torch.full((2, 2, 7), expected))
    plain = Attention(4).score(alike())
    assert_close(plain[..., :7], torch.full((2, 2, 7), sum(1 / (before + 1) for before in (6, 7, 8, 9)) / 4))


def test_by_length_counts_what_a_head_holds_and_not_what_came():
    """After an eviction, and in a row with fewer tokens; queries that a row has not had count nothing."""
    positions = torch.tensor([0, 1, 5, 6, 20, 21, 22, 23, -1, -1]).expand(2, 2, 10).clone()
    positions[1, 1] = torch.tensor([20, 21, 22, 23] + [-1] * 6)
    queries = torch.tensor([[20, 21, 22, 23], [-1, -1, 22, 23]])
    scores = Attention(4, by_length=True).score(alike(positions=positions, query_positions=queries))
    assert_close(scores[0, :, 0], torch.full((2,), sum(n / (n + 1) for n in (4, 5, 6, 7)) / 4))
    assert_close(scores[1, 0, 0], torch.tensor((6 / 7 + 7 / 8) / 2))
    assert_close(scores[1, 1, 0], torch.tensor((2 / 3 + 3 / 4) / 2))


def test_by_length_finds_entries_in_any_order():
    generator = torch.Generator().manual_seed(5)
    keys, queries = torch.randn(1, 2, 10, 4, generator=generator), torch.randn(1, 4, 4, 4, generator=generator)
    order = torch.randperm(10, generator=generator)
    view = view_of(keys, queries=queries)
    other = attrs.evolve(view, keys=keys[:, :, order], positions=view.positions[..., order], in_order=False)
    scorer = Attention(4, by_length=True)
    assert_close(scorer.score(other), scorer.score(view)[..., order])
    assert scorer.in_any_order()
    assert scorer.tile() == "weighs queries by the entries before them"
