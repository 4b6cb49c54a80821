"""Entries with votes give what published results give: merged by KeepKV, and attended to."""

import itertools
import json

import attrs
import pytest
import torch

import kvpolicy
from kvpolicy.attention.attend import attend as attend_held
from kvpolicy.cache.compaction.compaction_plan import CompactionPlan
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.plan.forward_observers import ForwardObserver
from kvpolicy.plan.plan import compile_policy
from kvpolicy.stages import Entries, Geometry, QueryLogits
from kvpolicy.stages.formats import ALL
from kvpolicy_plugins.mergers.keepkv import KeepKV
from kvpolicy_plugins.mergers.keepkv_groups import fold
from kvpolicy_plugins.mergers.shared.merge_groups import evicted_of, groups_of, nearest
from kvpolicy_plugins.mergers.shared.score_estimates import MovingAverage
from tests.golden.families import Vectors, cases, close, family_of, same
from tests.support.views import fresh_state, view_of

HALF = 2e-3  # what half precision may do to a similarity, or to a sum of scores, relatively


@pytest.mark.parametrize("path", cases("test_votes"), ids=lambda path: path.stem)
def test_published_results(path):
    vectors = Vectors(path)
    CHECKS[family_of(path.stem)](vectors)
    assert vectors.unread() == []


def attend(queries, keys, values, log_votes):
    """Output [B, H, Q, D] and log-sum-exp [B, H, Q] of attention over all entries, votes added to the logits."""
    group = queries.shape[1] // keys.shape[1]
    keys, values, votes = (one.repeat_interleave(group, 1) for one in (keys, values, log_votes))
    logits = queries @ keys.transpose(-1, -2) * keys.shape[-1] ** -0.5 + votes[:, :, None]
    return logits.softmax(-1) @ values, logits.logsumexp(-1)


def exact(found, expected):
    close(found, expected, atol=1e-9, rtol=1e-9)


def configured(v):
    """The JSON of `cfg`."""
    return json.loads(v.text("cfg"))


def check_attention(v):
    """Ragged heads: slots behind a head's length are attended with a log-vote of -inf."""
    queries, keys, values = (v[name].double() for name in "qkv")
    behind = torch.arange(keys.shape[2]) >= v["lengths"][..., None]
    log_votes = v["votes"].double().log().masked_fill(behind, -torch.inf)
    out, lse = attend(queries, keys, values, log_votes)
    close(out, v["out"], atol=1e-9, rtol=1e-7)
    close(lse, v["lse"], atol=1e-9, rtol=1e-7)
    junk = log_votes.nan_to_num(neginf=7.0).float()
    view = view_of(keys, queries=queries, lengths=v["lengths"], log_votes=junk)
    logits = view.logits.flatten(1, 2)
    close(logits.logsumexp(-1), v["lse"], atol=1e-5)
    seen = values.float().repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    close(logits.softmax(-1) @ seen, v["out"], atol=1e-5)
    for observers in ((), (ForwardObserver(ALL, {}, lambda _glimpse, _state: {}),)):  # at once, and block by block
        found = of_a_layer(v["q"], v["k"], v["v"], v["votes"].log(), v["lengths"], observers)
        close(found, v["out"], atol=1e-5)


def of_a_layer(queries, keys, values, log_votes, lengths, observers):
    """What the runtime's attention gives over ragged heads with votes."""
    rows, heads, slots, dim = keys.shape
    geometry = Geometry((0,), queries.shape[1], heads, dim)
    spec = kvpolicy.load("snapkv", merge="window_fit", allocate={"heads": "adaptive"}).spec
    held = SegmentedStorage(compile_policy(spec, geometry, "cpu", torch.float32), 0, rows, torch.device("cpu"))
    places = torch.arange(slots).expand(rows, heads, slots)
    kept = places.where(places < lengths[..., None], -1)
    entries = Entries(keys.float(), values.float(), log_votes.float())
    held.replace(CompactionPlan(range(rows), kept), entries, {"positions": places.int()}, slots)
    batch = torch.full((rows, queries.shape[2]), slots)
    return attend_held(
        held, QueryBatch(queries.float(), batch, padded=False, scaling=dim**-0.5), observers=observers, pads=False
    )


def check_reference(v):
    cfg = configured(v)
    queries, keys, values, votes, logits = (v[name] for name in ("q", "k", "v", "votes", "logits"))
    scaling = keys.shape[-1] ** -0.5
    exact((keys @ queries[..., None])[..., 0] * scaling, logits)
    score = (logits + votes.log()).softmax(-1)
    exact(score, v["score"])
    kept, target = v["keep_idx"], v["target"]
    middle = torch.arange(keys.shape[2])
    protected = ((middle < cfg["sink"]) | (middle >= keys.shape[2] - cfg["recent"])).expand_as(score)
    chosen = torch.where(protected, torch.inf, score).topk(cfg["n_keep"]).indices.sort(-1).values
    same(chosen, kept)
    view = view_of(keys, values=values, queries=queries[:, :, None], log_votes=votes.log())
    similarity, place = nearest(keys, kept, evicted_of(view, kept))
    evicted = similarity > -torch.inf
    exact(similarity[evicted], v["max_sim"][evicted])
    same(v["max_sim"].isnan(), ~evicted)
    groups = groups_of(kept, evicted & (similarity >= cfg["threshold"]), place)
    same(kept.gather(-1, groups.target).masked_fill(~groups.member, -1), target)
    compare_fold(v, fold(keys, values, logits, votes.log(), groups), groups.member)
    compare_merger(v, view, cfg["threshold"])
    check_moving_average(v)


def compare_fold(v, folded, member):
    queries, values = v["q"][:, :, None], v["v_merged"]
    scaling = queries.shape[-1] ** -0.5
    exact(folded.keys, v["k_merged_avg"])
    exact(folded.values, values)
    exact(folded.log_votes.exp(), v["votes_merged"])
    exact(folded.log_score, v["ln_s_merged"])
    exact(folded.gap, v["kl_gap"])
    close(folded.scale, v["key_scale"], atol=1e-9, rtol=1e-6)
    scaled = folded.scale[..., None] * folded.keys
    additive = folded.additive_keys(v["q"], scaling)
    close(scaled, v["k_merged"], atol=1e-9, rtol=1e-6)
    exact(additive, v["k_merged_additive"])
    mine, whole = v["votes"].log().masked_fill(~member, -torch.inf), v["votes"].log()
    for name, entries in {
        "out_full": (v["k"], v["v"], whole),
        "out_full_without_dropped": (v["k"], v["v"], mine),
        "out_merged": (scaled, folded.values, folded.log_votes),
        "out_avg_key": (folded.keys, folded.values, folded.log_votes),
        "out_additive": (additive, folded.values, folded.log_votes),
    }.items():
        close(attend(queries, *entries)[0][:, :, 0], v[name], atol=1e-8, rtol=1e-8)
    close(v["out_merged"], v["out_full_without_dropped"], atol=1e-8, rtol=1e-8)


def compare_merger(v, view, threshold):
    """The plugin as the cache calls it; alpha 0 makes the newest scores the estimate."""
    query_logits = QueryLogits(v["logits"][:, :, None, None])
    for key, keys in {"scale": "k_merged", "additive": "k_merged_additive", "mean": "k_merged_avg"}.items():
        merger = KeepKV(threshold, alpha=0, key=key, scale_max=1e9)
        state = {name: one.double() for name, one in fresh_state(merger, view).items()}
        entries = merger.merge(
            attrs.evolve(view, slot_state=merger.observe_forward(query_logits, state)), v["keep_idx"]
        )
        negative = (v["key_scale"] <= 0) & (key == "scale")
        expected = torch.where(negative[..., None], v["k_merged_additive"], v[keys])
        close(entries.keys, expected, atol=1e-9, rtol=1e-6)
        exact(entries.values, v["v_merged"])
        exact(entries.log_votes.exp(), v["votes_merged"])
        exact(entries.slot_state["log_estimate"], v["ln_s_merged"])


def check_moving_average(v):
    alpha, sequence = v["ema_alpha"].item(), v["ema_scores_seq"]
    expected = v["ema_corrected"]
    steps = sequence.shape[2]
    rule = MovingAverage(alpha, steps)
    state = {one.name: torch.full_like(sequence[:, :, 0], one.fill) for one in rule.states()}
    for step in range(steps):
        state = rule.observe_forward(QueryLogits(sequence[:, :, None, [step]].log()), state)
        exact(rule.log_scores(state).exp(), expected[:, :, step])
        at_once = {one.name: torch.full_like(sequence[:, :, 0], one.fill) for one in rule.states()}
        at_once = rule.observe_forward(QueryLogits(sequence[:, :, None, : step + 1].log()), at_once)
        exact(rule.log_scores(at_once).exp(), expected[:, :, step])


def check_released_code(v):
    """Prefill, then one token and one eviction at a time; half precision in the file, single here."""
    cfg = configured(v)
    window = cfg["recent_budget"]
    merger = KeepKV(cfg["similarity_threshold"], estimate="window", window=window, key="mean")
    keys, values, queries = v["keys0"], v["values0"], v["queries0"]
    view = view_of(keys, values=values, queries=queries)
    scores = view.logits.exp()[:, :, 0].tril()
    close(scores, v["exp_attn0"], atol=5e-3, rtol=5e-3)
    view = observed(merger, view, scores[..., -window:, :].log(), fresh_state(merger, view))
    entries = step_of(v, merger, view, cfg, 0)
    for step in range(1, cfg["steps"] + 1):
        query = v[f"q{step}"]
        keys, values = (torch.cat(pair, 2) for pair in zip(held(entries), new_entry(v, step), strict=True))
        view = view_of(keys, values=values, queries=query, log_votes=longer(entries.log_votes, 0.0))
        out, _ = attend(query, keys, values, view.log_votes)
        close(out, v[f"attn_out{step}"], atol=5e-3, rtol=5e-3)
        fills = {one.name: one.fill for one in merger.slot_state()}
        state = {name: longer(one, fills[name]) for name, one in entries.slot_state.items()}
        logits = view.logits[:, :, 0] - view.log_votes[:, :, None]
        entries = step_of(v, merger, observed(merger, view, logits, state), cfg, step)


def held(entries):
    return entries.keys, entries.values


def new_entry(v, step):
    return v[f"k_new{step}"], v[f"v_new{step}"]


def longer(carried, fill):
    """Slot state with a slot for the token that has come."""
    return torch.cat([carried, torch.full_like(carried[..., :1], fill)], -1)


def observed(merger, view, logits, state):
    return attrs.evolve(view, slot_state=merger.observe_forward(QueryLogits(logits[:, :, None]), state))


def step_of(v, merger, view, cfg, step):
    """One merge, compared with the file; where half precision may have chosen others, what the file chose counts."""
    votes = v[f"votes_after{step}"]
    votes = votes.reshape(*view.keys.shape[:2], -1)
    kept, groups = grouping_with(votes, merger, view, cfg)
    entries = merger.merge_groups(view, kept, groups)
    close(entries.log_votes.exp(), votes, atol=1e-4)
    close(entries.keys, v[f"keys_after{step}"], atol=5e-3, rtol=5e-3)
    close(entries.values, v[f"values_after{step}"], atol=5e-3, rtol=5e-3)
    return entries


def grouping_with(votes, merger, view, cfg):
    """Kept slots and groups, of each head those nearest to `votes` [B, K, N] among those that rounding may give."""
    batch, heads, slots = view.positions.shape
    old = torch.zeros(batch, heads, slots) if view.log_votes is None else view.log_votes
    kept, joins = torch.empty_like(votes, dtype=torch.int64), torch.zeros(batch, heads, slots, dtype=torch.bool)
    place = torch.zeros(batch, heads, slots, dtype=torch.int64)
    for row, head in itertools.product(range(batch), range(heads)):

        def miss(option, at=(row, head)):
            keep, goes = option
            sums = old[at][keep].exp()
            for slot, onto in goes.items():
                sums[onto] += old[at][slot].exp()
            return (sums - votes[at]).abs().sum().item()

        keep, goes = min(options_of(merger, view, cfg, row, head), key=miss)
        kept[row, head] = torch.tensor(keep)
        for slot, onto in goes.items():
            joins[row, head, slot], place[row, head, slot] = True, onto
    return kept, groups_of(kept, joins, place)


def options_of(merger, view, cfg, row, head):
    """Kept slots, and the place in them that an evicted slot goes to, as [kept], {evicted: place}.

    The first one is that of exact arithmetic, the others are within the error of half precision.
    """
    keys = view.keys[row, head].double()
    directions = keys / keys.norm(dim=-1, keepdim=True)
    for kept in kept_options(view, cfg, row, head):
        evicted = [slot for slot in range(len(keys)) if slot not in kept]
        choices = [goals(directions[kept] @ directions[slot], merger.threshold) for slot in evicted]
        for chosen in itertools.product(*choices):
            pairs = zip(evicted, chosen, strict=True)
            yield kept, {slot: onto for slot, onto in pairs if onto is not None}


def kept_options(view, cfg, row, head):
    """Sinks, recent window and the heaviest between, newer queries weighing more."""
    window, sinks, slots = cfg["recent_budget"], cfg["sink_len"], view.keys.shape[2]
    scores = torch.stack([view.slot_state[f"log_score_{back}"][row, head] for back in reversed(range(window))]).exp()
    weights = torch.linspace(1, cfg["distance_weight"], window, dtype=torch.float64)
    heavy = (weights @ scores.double())[sinks : slots - window]
    order = (heavy.sort(descending=True, stable=True).indices + sinks).tolist()
    count = cfg["heavy_budget"] - sinks
    always = [*range(sinks), *range(slots - window, slots)]
    yield sorted(always + order[:count])
    last, first = order[count - 1], order[count]
    if heavy[first - sinks] > (1 - HALF) * heavy[last - sinks]:
        yield sorted([*always, *order[: count - 1], first])


def goals(similarity, threshold):
    """Places that an evicted slot may go to, the likeliest first; None = it is dropped."""
    best = similarity.max().item()
    near = (similarity >= max(best - HALF, threshold - HALF)).nonzero().flatten().tolist()
    near.sort(key=lambda place: -similarity[place].item())
    if best < threshold:
        return [None, *near]
    return [*near, None] if best < threshold + HALF else near


CHECKS = {
    "keepkv": check_reference,
    "keepkv_released_code": check_released_code,
    "vote_bias_attention": check_attention,
}
