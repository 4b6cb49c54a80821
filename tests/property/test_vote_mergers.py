"""What holds for mergers that keep votes, whatever they are given."""

import attrs
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from kvpolicy.stages import QueryLogits
from kvpolicy.stages.slots import gather, indices_of
from kvpolicy_plugins.mergers.drop import Drop
from kvpolicy_plugins.mergers.keepkv import KeepKV
from kvpolicy_plugins.mergers.keepkv_groups import fold
from kvpolicy_plugins.mergers.shared.merge_groups import (
    groups_of,
    logsumexp_by_target,
    sum_by_target,
)
from kvpolicy_plugins.mergers.shared.score_estimates import MovingAverage
from kvpolicy_plugins.mergers.shared.window_logits import newest_queries
from tests.property.layers import generators
from tests.property.votes import (
    KEYS,
    attend,
    hidden,
    keepkvs,
    layer_queries,
    mean_fits,
    members_of,
    observed,
    raw_logits,
    some_kept,
    views,
    window_fits,
    with_votes,
)
from tests.support.examples import examples
from tests.support.views import view_of


@settings(max_examples=examples(50))
@given(views, generators, st.sampled_from((-1.0, 0.3)), st.sampled_from(KEYS), st.sampled_from((1.0, 50.0)))
def test_the_newest_query_gets_what_it_got(view, random, threshold, key, scale_max):
    """Invariant 1; all heads of a group ask the same, and nothing else is known of the scores."""
    for precise, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        layer = with_votes(view, random, precise)
        kept, heads = some_kept(view, random), view.keys.shape[1]
        group = layer.queries.shape[1] // heads
        one = layer.queries[:, ::group].repeat_interleave(group, 1)
        layer = attrs.evolve(layer, queries=one)
        merger = KeepKV(threshold, alpha=0, key=key, scale_max=scale_max if precise == torch.float64 else 1.0)
        queries = newest_queries(layer)
        entries = merger.merge(observed(merger, layer, queries[:, :, :, None]), kept)
        shown = members_of(layer, kept, threshold).member
        before = attend(
            queries, layer.keys, layer.values.masked_fill(~view.valid[..., None], 0), hidden(layer.log_votes, shown)
        )
        after = attend(queries, entries.keys, entries.values, hidden(entries.log_votes, kept >= 0))
        some = (kept >= 0).any(-1)
        for found, expected in zip(after, before, strict=True):
            assert_close(found[some], expected[some], atol=tolerance, rtol=tolerance)


@given(views, generators)
def test_least_squares_give_each_head_its_mass(view, random):
    layer = with_votes(view, random)
    queries = newest_queries(layer)
    assume(torch.linalg.cond(queries).max() < 1e3)
    assume(queries.shape[2] <= queries.shape[3])
    kept = some_kept(view, random)
    merger = KeepKV(-1, key="additive", gqa="lstsq")
    entries = merger.merge(observed(merger, layer, queries[:, :, :, None]), kept)
    _, before = attend(queries, layer.keys, layer.values, hidden(layer.log_votes, view.valid))
    _, after = attend(queries, entries.keys, entries.values, hidden(entries.log_votes, kept >= 0))
    some = view.valid.any(-1)
    assert_close(after[some], before[some], atol=1e-7, rtol=1e-7)


@given(views, generators, keepkvs)
def test_keepkv_counts_votes_and_keeps_scores(view, random, merger):
    """Invariants 2 and 8: votes are those of the members, and a group's votes times its score is their sum."""
    layer = with_votes(view, random)
    layer = observed(merger, layer, torch.randn(*newest_queries(layer)[:, :, :, None].shape, generator=random).double())
    kept = some_kept(view, random)
    groups = members_of(layer, kept, merger.threshold)
    entries = merger.merge(layer, kept)
    counted = sum_by_target(groups.member.double(), layer.log_votes.exp()[..., None], groups.target, kept.shape[-1])
    held = kept >= 0
    if merger.key != "bias" and (merger.key, merger.fallback) != ("scale", "bias"):
        assert_close(entries.log_votes.exp()[held], counted[..., 0][held])
    assert (entries.log_votes.exp()[held] <= counted[..., 0][held] * (1 + 1e-9)).all()
    for name, before in layer.slot_state.items():
        if name != "samples":
            mass = hidden(layer.log_votes + before, groups.member)
            after = (entries.log_votes + entries.slot_state[name])[held]
            expected = logsumexp_by_target(mass, groups.target, kept.shape[-1])[held]
            assert_close(after, expected, atol=1e-9, rtol=1e-9)


@given(
    views, generators, st.one_of(keepkvs, window_fits), st.sampled_from((torch.float64, torch.float32, torch.bfloat16))
)
def test_what_is_not_merged_is_bit_for_bit_what_it_was(view, random, merger, dtype):
    """Invariant 3; also, that `changed` is where others joined."""
    layer = attrs.evolve(view, keys=view.keys.to(dtype), values=view.values.to(dtype))
    layer = observed(
        merger, attrs.evolve(layer, log_votes=torch.rand(view.positions.shape, generator=random)), layer_queries(view)
    )
    kept = some_kept(view, random)
    entries = merger.merge(layer, kept)
    alone = ~entries.changed
    parts = {"keys": entries.keys, "values": entries.values, "log_votes": entries.log_votes}
    for name, part in parts.items():
        assert part.dtype == getattr(layer, name).dtype
        assert torch.equal(part[alone], gather(getattr(layer, name), kept)[alone])
    for name, part in entries.slot_state.items():
        assert torch.equal(part[alone], gather(layer.slot_state[name], kept)[alone])
    if isinstance(merger, KeepKV):
        assert torch.equal(entries.changed, members_of(layer, kept, merger.threshold).merged)
    everything = merger.merge(layer, indices_of(view.valid))
    assert not everything.changed.any()


@settings(max_examples=examples(50))
@given(views, generators, st.one_of(keepkvs, mean_fits))
def test_values_stay_between_those_of_the_members(view, random, merger):
    """Invariant 5."""
    layer = observed(merger, with_votes(view, random), layer_queries(view))
    kept = some_kept(view, random)
    entries = merger.merge(layer, kept)
    lowest, highest = layer.values[view.valid].amin(0), layer.values[view.valid].amax(0)
    held = entries.values[kept >= 0]
    assert (held >= lowest - 1e-9).all()
    assert (held <= highest + 1e-9).all()


@settings(max_examples=examples(50))
@given(views, generators, st.one_of(keepkvs, window_fits))
def test_no_votes_are_votes_of_one(view, random, merger):
    """Invariant 7."""
    layer = observed(merger, view, layer_queries(view))
    kept = some_kept(view, random)
    ones = attrs.evolve(layer, log_votes=torch.zeros(view.positions.shape))
    found, expected = merger.merge(layer, kept), merger.merge(ones, kept)
    for name in ("keys", "values", "log_votes"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@given(views, generators, keepkvs)
def test_an_unreachable_threshold_is_plain_eviction(view, random, merger):
    """Invariant 9."""
    merger = attrs.evolve(merger, threshold=1.001)
    layer = observed(merger, with_votes(view, random), layer_queries(view))
    kept = some_kept(view, random)
    found, expected = merger.merge(layer, kept), Drop().merge(layer, kept)
    for name in ("keys", "values", "log_votes"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@given(generators, st.integers(2, 6), st.floats(0.1, 8.0))
def test_the_order_of_members_does_not_count_and_the_mean_key_is_never_too_light(random, count, size):
    """Invariants 4 and 6, and the identity behind 4: the gap is a Kullback-Leibler divergence."""
    keys, values = torch.randn(2, 8, 1, count, 16, generator=random, dtype=torch.float64)
    scores = size * torch.randn(8, 1, count, generator=random, dtype=torch.float64)
    votes = torch.randint(1, 9, scores.shape, generator=random).double()
    groups = groups_of(
        torch.zeros(8, 1, 1, dtype=torch.int64),
        torch.arange(count).expand(8, 1, count) > 0,
        torch.zeros(8, 1, count, dtype=torch.int64),
    )
    folded = fold(keys, values, scores, votes.log(), groups)
    order = torch.randperm(count, generator=random)
    other = fold(keys[:, :, order], values[:, :, order], scores[..., order], votes[..., order].log(), groups)
    for name in attrs.fields_dict(type(folded)):
        assert_close(getattr(other, name), getattr(folded, name))
    weights, shares = (votes * scores.exp()), votes / votes.sum(-1, keepdim=True)
    weights = weights / weights.sum(-1, keepdim=True)
    divergence = (weights * (weights / shares).log()).sum(-1, keepdim=True)
    assert_close(folded.gap, divergence, atol=1e-10, rtol=1e-8)
    assert (folded.gap > -1e-12).all()
    assert_close(folded.log_mass.exp(), (votes * scores.exp()).sum(-1, keepdim=True))


@given(generators, st.floats(0.01, 0.6), st.booleans())
def test_the_error_of_estimates_is_bounded(random, wrong, alike):
    """Invariant 10, theorem 5: pairs among other entries, scores known up to a factor; where 0 < c <= 1."""
    trials, others, dim = 64, 6, 8
    query = torch.randn(trials, 1, 1, dim, generator=random, dtype=torch.float64)
    keys, values = torch.randn(2, trials, 1, others + 2, dim, generator=random, dtype=torch.float64)
    if alike:
        keys[:, :, 1] = keys[:, :, 0] + 0.1 * keys[:, :, 1]
    view = view_of(keys, values=values, queries=query)
    factors = 1 + wrong * (2 * torch.rand(keys.shape[:3], generator=random, dtype=torch.float64) - 1)
    votes = torch.randint(1, 5, keys.shape[:3], generator=random).double().log()
    scores = raw_logits(view, query[:, :, None])[:, :, 0, 0] + factors.log()
    kept = torch.arange(1, others + 2).expand(trials, 1, -1)
    first = torch.arange(others + 2).expand(trials, 1, -1) == 0
    folded = fold(keys, values, scores, votes, groups_of(kept, first, torch.zeros_like(first, dtype=torch.int64)))
    merged = torch.cat([folded.scale[..., :1, None] * folded.keys[:, :, :1], keys[:, :, 2:]], 2)
    joined = torch.cat([folded.values[:, :, :1], values[:, :, 2:]], 2)
    log_votes = torch.cat([folded.log_votes[..., :1], votes[..., 2:]], -1)
    queries = query.squeeze(2)[:, :, None]
    error = attend(queries, merged, joined, log_votes)[0] - attend(queries, keys, values, votes)[0]
    eps = (1 - factors[..., :2]).abs().amax(-1)
    bound = 2 * eps * (1 + eps) / (1 - eps) ** 2 * (values[:, :, 0] - values[:, :, 1]).norm(dim=-1)
    guarded = (folded.scale[..., 0] > 0) & (folded.scale[..., 0] <= 1)
    assert (error.norm(dim=-1).squeeze(-1) <= bound + 1e-12)[guarded].all()


@given(generators, st.integers(1, 12), st.sampled_from((0.0, 0.5, 0.9)))
def test_a_moving_average_does_not_mind_how_many_queries_come_at_a_time(random, count, alpha):
    logits = torch.randn(2, 3, 2, count, 7, generator=random, dtype=torch.float64)
    logits = logits.masked_fill(torch.rand(2, 3, 1, count, 7, generator=random) < 0.3, -torch.inf)
    rule = MovingAverage(alpha, count)
    start = {one.name: torch.full((2, 3, 7), one.fill, dtype=torch.float64) for one in rule.states()}
    at_once, state = rule.observe_forward(QueryLogits(logits), start), start
    for part in logits.split(int(torch.randint(1, 4, (), generator=random)), -2):
        state = rule.observe_forward(QueryLogits(part), state)
    for name, one in state.items():
        assert_close(at_once[name], one)
    plain = torch.zeros(2, 3, 7, dtype=torch.float64)
    for step in range(count):
        seen = logits[:, :, 0, step] > -torch.inf
        plain = torch.where(seen, alpha * plain + (1 - alpha) * logits[..., step, :].exp().mean(2), plain)
    assert_close(state["log_estimate"].exp(), plain)
    assert torch.equal(state["samples"], (logits[:, :, 0] > -torch.inf).sum(-2).double())
