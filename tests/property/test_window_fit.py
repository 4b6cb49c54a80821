"""Window fits are what a plain form gives, and better than dropping for the queries that they were fitted to."""

import attrs
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from kvpolicy.stages.slots import gather
from kvpolicy_plugins.mergers.drop import Drop
from kvpolicy_plugins.mergers.shared.merge_groups import (
    kept_index,
)
from kvpolicy_plugins.mergers.shared.window_logits import newest_queries
from kvpolicy_plugins.mergers.window_fit import WindowFit
from tests.property.layers import generators, layers
from tests.property.votes import (
    attend,
    hidden,
    layer_queries,
    some_kept,
    views,
    window_fits,
    with_votes,
)
from tests.support.examples import examples
from tests.support.views import view_of


@settings(max_examples=examples(30))
@given(layers(("normal", "clustered", "one hot"), most=16), generators, window_fits)
def test_a_window_fit_is_what_a_plain_form_gives(view, random, merger):
    layer = attrs.evolve(with_votes(view, random, torch.float32))
    kept = some_kept(view, random)
    entries = merger.merge(layer, kept)
    for row, head in torch.cartesian_prod(*map(torch.arange, kept.shape[:2])).reshape(-1, 2).tolist():
        slots = kept[row, head][kept[row, head] >= 0].tolist()
        members = {n: [slot] for n, slot in enumerate(slots)}
        for slot, onto in plain_assignment(layer, merger, row, head, slots).items():
            members[onto].append(slot)
        solved = plain_values(layer, merger, row, head, members) if merger.values == "solve" else {}
        for n, group in members.items():
            assert bool(entries.changed[row, head, n]) == (len(group) > 1)
            if len(group) > 1:
                key, value, votes = plain_fit(layer, merger, row, head, group)
                value = solved.get(n, value)
                assert_close(entries.keys[row, head, n].double(), key, atol=1e-4, rtol=1e-3)
                assert_close(entries.values[row, head, n].double(), value, atol=1e-4, rtol=1e-3)
                assert_close(entries.log_votes[row, head, n].double(), votes, atol=1e-3, rtol=1e-3)


def plain_window(view, merger, row, head):
    """Queries [n, D] of one KV head that were ever asked, scaled, and their positions."""
    asked = view.window_positions[row][-merger.queries :]
    queries = layer_queries(view)[row, head, :, -merger.queries :].double() * view.scaling
    real = [
        (query, at)
        for head_queries in queries
        for query, at in zip(head_queries, asked.tolist(), strict=True)
        if at >= 0
    ]
    return [query for query, _ in real], [at for _, at in real]


def plain_probabilities(view, merger, row, head):
    """[n, T], and the logits, -inf for what comes later."""
    queries, asked = plain_window(view, merger, row, head)
    positions = view.positions[row, head]
    logits = torch.stack(queries) @ view.keys[row, head].double().T + view.log_votes[row, head].double()
    seen = (positions >= 0) & (positions <= torch.tensor(asked)[:, None])
    logits = logits.masked_fill(~seen, -torch.inf)
    return logits.softmax(-1), logits, torch.tensor(asked)


def plain_assignment(view, merger, row, head, slots):
    """The place of the survivor that each evicted slot goes to; what rounding decides is not tried."""
    probabilities, logits, _ = plain_probabilities(view, merger, row, head)
    attention = probabilities.sum(0) / (logits > -torch.inf).sum(0).clamp(min=1)
    evicted = [slot for slot in range(int(view.lengths[row, head])) if slot not in slots]
    if not evicted:
        return {}
    usual = merger.attended * attention[evicted].mean()
    assume(not ((attention[slots] / usual - 1).abs() < 2e-4).any())
    hosts = [n for n, slot in enumerate(slots) if attention[slot] >= usual]
    keys, values = view.keys[row, head].double(), view.values[row, head].double()
    goes = {}
    for slot in evicted if hosts else ():
        if merger.assign == "cosine":
            worth = torch.nn.functional.cosine_similarity(keys[slot], keys[slots][hosts], dim=-1, eps=1e-6)
            assume(((worth - merger.threshold).abs() > 1e-5).all())
        else:
            apart = torch.stack(plain_window(view, merger, row, head)[0]) @ (keys[slots][hosts] - keys[slot]).T
            size = values[: int(view.lengths[row, head])].square().sum(-1).mean()
            distance = apart.square().mean(0) + (values[slots][hosts] - values[slot]).square().sum(-1) / size
            mine, theirs = attention[slot], attention[slots][hosts]
            worth = -distance * mine * theirs / (mine + theirs)
        best = worth.sort(descending=True).values[:2]
        assume(len(best) < 2 or best[0] - best[1] > 1e-5 * best.abs().max())
        if merger.threshold == -1 or worth.max() >= merger.threshold:
            goes[slot] = hosts[worth.argmax()]
    return goes


def plain_fit(view, merger, row, head, group):
    probabilities, logits, asked = plain_probabilities(view, merger, row, head)
    counts = asked >= view.positions[row, head, group].max()
    queries = torch.stack(plain_window(view, merger, row, head)[0])[counts]
    mine, given = probabilities[counts][:, group], probabilities[counts][:, group].sum(-1)
    votes = view.log_votes[row, head, group].double().exp()
    weights = mine.sum(0) / given.sum() if given.sum() > 0 else votes / votes.sum()
    key = weights @ view.keys[row, head, group].double()
    missing = logits[counts][:, group].logsumexp(-1) - queries @ key
    bias = (given * missing).sum() / given.sum() if given.sum() > 0 else votes.sum().log()
    return key, weights @ view.values[row, head, group].double(), bias


def plain_values(view, merger, row, head, members):
    """Solved values of the groups of several entries, by their place: one query after another, one system of rows."""
    queries, asked = plain_window(view, merger, row, head)
    at, held, several = view.positions[row, head], view.values[row, head].double(), []
    fits = [plain_fit(view, merger, row, head, group) for group in members.values()]
    _, logits, _ = plain_probabilities(view, merger, row, head)
    rows, outputs = [], []
    for query, position, seen in zip(queries, asked, logits, strict=True):
        whole = [n for n, group in members.items() if at[group].max() <= position]
        if not whole:
            continue
        of_groups = [slot for n in whole for slot in members[n]]
        before = seen[of_groups].softmax(-1) @ held[of_groups]
        now = torch.stack([query @ fits[n][0] + fits[n][2] for n in whole]).softmax(-1)
        several = [n for n, group in members.items() if len(group) > 1]
        alone = sum((x * fits[n][1] for n, x in zip(whole, now, strict=True) if n not in several), 0 * before)
        rows.append([now[whole.index(n)] if n in whole else now.new_zeros(()) for n in several])
        outputs.append(before - alone)
    if not rows or not several:
        return {}
    matrix, target = torch.tensor(rows, dtype=torch.float64), torch.stack(outputs)
    prior = torch.stack([fits[n][1] for n in several])
    vector = torch.ones(len(several), dtype=torch.float64)
    for _ in range(3):
        vector = matrix.T @ (matrix @ (vector / vector.norm().clamp(min=1e-30)))
    size = (matrix @ (vector / vector.norm().clamp(min=1e-30))).norm()
    held_back = (merger.ridge**0.5 * size) * torch.eye(len(several), dtype=torch.float64)
    found = torch.linalg.lstsq(torch.cat([matrix, held_back]), torch.cat([target, held_back @ prior]), driver="gelsd")
    return dict(zip(several, found.solution, strict=True)) if size > 1e-6 else {}


@given(views, generators, st.sampled_from(("cosine", "ward")))
def test_equal_keys_fit_every_query(view, random, assign):
    """Votes of equal keys add up; if their values are equal too nothing is lost for any query."""
    layer = with_votes(view, random)
    kept = some_kept(view, random)
    onto = torch.randint(int(kept.shape[-1]), view.positions.shape, generator=random)
    onto = onto.where(gather_places(kept, onto), 0)
    own = kept_index(kept, view.positions.shape[-1])
    source = kept.gather(-1, torch.where(own >= 0, own, onto)).clamp(min=0)
    layer = attrs.evolve(layer, keys=gather(view.keys, source), values=gather(view.values, source))
    entries = WindowFit(assign, attended=0).merge(layer, kept)
    queries = torch.randn(*newest_queries(layer).shape, generator=random)
    before = attend(queries, layer.keys, layer.values, hidden(layer.log_votes.float(), view.valid))
    after = attend(queries, entries.keys, entries.values, hidden(entries.log_votes.float(), kept >= 0))
    some = view.valid.any(-1)
    for found, expected in zip(after, before, strict=True):
        assert_close(found[some], expected[some], atol=2e-4, rtol=1e-3)


def gather_places(kept, places):
    """Whether a place in `kept` [B, K, N] holds a slot, for places [B, K, T]."""
    return kept.gather(-1, places) >= 0


@settings(max_examples=examples(20))
@given(generators, st.sampled_from(("cosine", "ward")), st.sampled_from((1, 4)), st.sampled_from((0.25, 0.5, 0.8)))
def test_merging_is_better_than_dropping_for_the_window(random, assign, group, spread):
    """Clusters of keys, as attention sees them; also for later queries of the same kind."""
    batch, slots, dim, clusters, budget = 4, 128, 32, 24, 32
    centres = torch.randn(batch, 1, clusters, dim, generator=random)
    chosen = torch.randint(clusters, (batch, 1, slots), generator=random)
    keys = gather(centres, chosen) + spread * torch.randn(batch, 1, slots, dim, generator=random)
    values = torch.randn(batch, 1, slots, dim, generator=random)
    queries = 1.5 * torch.randn(batch, group, 2 * 16, dim, generator=random)
    after = torch.arange(slots, slots + 16).expand(batch, -1)
    view = view_of(keys, values=values, queries=queries[:, :, :16], query_positions=after)
    kept = view.logits.softmax(-1).sum((2, 3)).topk(budget).indices.sort(-1).values
    entries, dropped = WindowFit(assign).merge(view, kept), Drop().merge(view, kept)
    for asked in (queries[:, None, :, :16], queries[:, None, :, 16:]):
        asked = asked.flatten(2, 3)  # noqa: PLW2901
        full, _ = attend(asked, keys, values, torch.zeros(batch, 1, slots))
        none = torch.zeros(batch, 1, budget)
        merged_error = (attend(asked, entries.keys, entries.values, entries.log_votes)[0] - full).norm()
        dropped_error = (attend(asked, dropped.keys, dropped.values, none)[0] - full).norm()
        assert merged_error < 0.9 * dropped_error
