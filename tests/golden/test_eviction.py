"""The built-in plugins give what the authors' own code gave: scores within tolerance, kept sets exactly."""

import pytest
import torch

from kvpolicy.stages.slots import indices_of
from kvpolicy_plugins.allocators.adaptive import Adaptive
from kvpolicy_plugins.allocators.pyramid import Pyramid
from kvpolicy_plugins.scorers.attention_based.accumulated_attention import AccumulatedAttention
from kvpolicy_plugins.scorers.attention_based.attention import Attention
from kvpolicy_plugins.scorers.attention_free.key_norm import KeyNorm
from kvpolicy_plugins.scorers.attention_free.redundancy import Redundancy
from kvpolicy_plugins.scorers.recency import Recency
from kvpolicy_plugins.scorers.shared.pooling import Pool
from kvpolicy_plugins.selectors.topk import TopK
from tests.golden import gkv
from tests.golden.families import Vectors, cases, close, family_of, same
from tests.support.allocating import counts_of, shares_of
from tests.support.references import causal_attention, mass
from tests.support.selecting import selected_by
from tests.support.views import keep, view_of

POOLS = {"maxpool": "max", "avgpool": "average", "none": "none"}
CODES = ("factory", "adakv_pyram")


@pytest.mark.parametrize("path", cases("test_eviction"), ids=lambda path: path.stem)
def test_published_results(path):
    vectors = Vectors(path)
    CHECKS[family_of(path.stem)](vectors)
    assert vectors.unread() == []


def unpadded(kept):
    """Keep indices [..., N] without the columns that are -1 everywhere."""
    return kept[..., : int((kept >= 0).sum(-1).max())]


def rkv_importance(v, kind="max", queries=None):
    window = v.parameter("window")
    pool = Pool(kind, v.parameter("kernel"))
    return Attention(queries or window, softmax="candidates", group="max", group_at="logits", pool=pool)


def rkv_scores(v, view):
    part = v.parameter("lambda")
    redundancy = Redundancy(v.parameter("threshold")).score(view)
    return part * rkv_importance(v).score(view) - (1 - part) * redundancy


def check_finch(v):
    """Scores of all but the window, to which the class gives more than the largest of all."""
    window, queries = int(v["window_size"]), v["queries_rope"]
    v["attentions"]  # of all queries
    view = view_of(v["keys"], values=v["values"], queries=queries[:, :, -window:], recent=window)
    for by_length, name in ((True, "score"), (False, "score_unnormalized")):
        scores, expected = Attention(window, by_length=by_length).score(view)[..., :-window], v[name]
        close(scores, expected[..., :-window])
        close((scores.amax() + 1).expand(expected[..., -window:].shape), expected[..., -window:])


def check_rkv(v):
    window, budget = v.parameter("window"), v.parameter("budget")
    view = view_of(v["k"], queries=v["q"], recent=window)
    slots = view.keys.shape[2] - window
    scores = rkv_scores(v, view)
    close(rkv_importance(v, "none").score(view)[..., :slots], v["importance_raw"])
    close(rkv_importance(v).score(view)[..., :slots], v["importance"])
    close(Redundancy(v.parameter("threshold")).score(view), v["redundancy"], atol=2e-8, rtol=1e-6)
    close(scores[..., :slots], v["score"], atol=2e-8, rtol=0)
    same(keep(view, scores, budget), v["kept_sorted"])
    same(v["kept_in_score_order"].sort(-1).values, v["kept_sorted"])
    if "quirk_batch0_score" in v:
        check_rkv_first_sample_for_all(v, view, budget)


def check_rkv_first_sample_for_all(v, view, budget):
    part = v.parameter("lambda")
    redundancy = Redundancy(v.parameter("threshold")).score(view)[:1]
    scores = part * rkv_importance(v).score(view) - (1 - part) * redundancy
    close(scores[view.candidates], v["quirk_batch0_score"].flatten(), atol=2e-8, rtol=0)
    same(keep(view, scores, budget), v["quirk_batch0_kept_sorted"])


def check_rkv_similarity(v):
    view, threshold = view_of(v["k"]), v.parameter("threshold")
    last = Redundancy(threshold).score(view)[0]
    close(last, v["redundancy_last"], atol=2e-8, rtol=1e-6)
    for name in v.like("redundancy_last_percent_*"):
        close(last, v[name], atol=2e-8, rtol=1e-6)
    # The published mode `first` takes non-look-alikes for slot 0, so every row forgives slot 0.
    first = Redundancy(threshold, forgive=0, empty_row="slot0").score(view)[0]
    close(first, v["redundancy_first"], atol=2e-8, rtol=1e-6)


def check_rkv_rounds(v):
    keys, budget, step = v["k_all"], v.parameter("budget"), v.parameter("step")
    length = v.parameter("first_len")
    held = torch.arange(length).expand(*keys.shape[:2], length)
    for turn in range(v.parameter("rounds")):
        chosen = keys.gather(2, held[..., None].expand(*held.shape, keys.shape[-1]))
        recent = v.parameter("window")
        view = view_of(chosen, positions=held, queries=v["q_rounds"][turn], recent=recent)
        held = held.gather(-1, keep(view, rkv_scores(v, view), budget))
        same(held, v["kept_positions_if_sorted_each_round"][turn])
        if turn == 0:  # later on the published code pools over entries in the order of their scores
            same(held, v["kept_positions_official_order"][turn].sort(-1).values)
        new = torch.arange(length, length + step).expand(*keys.shape[:2], step)
        held, length = torch.cat([held, new], -1), length + step


def check_decode_snapkv(v):
    window = v.parameter("window")
    view = view_of(v["k"], queries=v["q"], recent=window)
    scores = rkv_importance(v).score(view)
    close(scores[..., : -view.recent], v["score"])
    same(keep(view, scores, v.parameter("budget")), v["kept_sorted"])
    same(v["kept_in_score_order"].sort(-1).values, v["kept_sorted"])


def snapkv(v, *, per_query_head, capacity="capacity", **attention):
    """The view and the scores of a SnapKV-like file: (group,) pool of the window's attention."""
    queries, keys, window = v["q_window"], v["k"], v.parameter("window")
    if per_query_head:
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    group = v.parameter("group_agg", "mean")
    pool = Pool(POOLS[v.parameter("pooling", "avgpool")], v.parameter("kernel"))
    view = view_of(keys, queries=queries, recent=window)
    scorer = Attention(window, group="mean" if group == "none" else group, pool=pool, **attention)
    return view, scorer.score(view), v.parameter(capacity)


def check_snapkv(v):
    view, scores, capacity = snapkv(v, per_query_head=v.parameter("granularity") == "query_head", reduce="sum")
    kept = keep(view, scores, capacity)
    close(scores[..., : -view.recent], v["score"])
    same(kept, v["kept_sorted"])
    same(v["kept_in_score_order"].sort(-1).values, v["kept_sorted"])
    close(scores.gather(-1, kept[..., : -view.recent]).amin(-1), v["kth_score"])


def check_snapkv_ties(v):
    view, scores, capacity = snapkv(v, per_query_head=v.parameter("granularity") == "query_head", reduce="sum")
    close(scores[..., : -view.recent], v["score"])
    kept = keep(view, scores, capacity)
    dropped = view.candidates.scatter(-1, kept, value=False)
    border = v["kth_score"]
    assert kept.shape == v["kept_sorted"].shape == v["kept_in_score_order"].shape
    assert (scores.gather(-1, kept[..., : -view.recent]) >= border[..., None] - 1e-6).all()
    assert (scores.masked_fill(~dropped, -torch.inf) <= border[..., None] + 1e-6).all()


def pyramid_rows(v):
    for row, config in enumerate(v["cfg_L_T_cap_W_beta"].tolist()):
        layers, length, capacity, window, beta = config
        yield row, (layers, capacity, window, length), beta


def check_pyramidkv_budgets(v):
    for row, request, beta in pyramid_rows(v):
        published = Pyramid(beta, "floor_step")
        layers, budget, protected, length = request
        factory, ada = (v[f"tokens_kept_{code}"][row, :layers].tolist() for code in CODES)
        if -2 not in factory:  # -2: the published code divides by zero
            assert list(shares_of(published, *request)) == factory
        if -2 not in ada:  # the same ramp, without the branch for short sequences
            ramp = published._floored_ramp(budget - protected, length - protected, layers)
            assert [min(length, share + protected) for share in ramp] == ada


def check_spec_pyramidkv(v):
    for row, request, beta in pyramid_rows(v):
        expected = v["tokens_kept_spec"][row, : request[0]].tolist()
        assert list(shares_of(Pyramid(beta), *request)) == expected


def check_pyramidkv_kept(v):
    view, scores, capacity = snapkv(v, per_query_head=False, reduce="sum")
    close(scores[..., : -view.recent], v["score"])
    request = v.parameter("layers"), capacity, view.recent, view.keys.shape[2]
    budgets = shares_of(Pyramid(v.parameter("beta"), "floor_step"), *request)
    for layer in v["layer_ids"].tolist():
        same(keep(view, scores, budgets[layer]), v[f"kept_sorted_layer{layer}"])


def check_h2o_decode(v):
    queries, keys, prompt = v["q"], v["k"], v.parameter("prompt")
    budget = v.parameter("hh") + v.parameter("recent")
    held = torch.arange(prompt).expand(*keys.shape[:2], prompt)
    received = mass(causal_attention(queries[:, :, :prompt], keys[:, :, :prompt]))
    for step, expected in enumerate(v["kept_positions"]):
        if step:
            newest = prompt + step - 1
            held = torch.cat([held, torch.full_like(held[..., :1], newest)], -1)
            chosen = keys.gather(2, held[..., None].expand(*held.shape, keys.shape[-1]))
            received = torch.cat([received, torch.zeros_like(received[..., :1])], -1)
            received = received + mass(causal_attention(queries[:, :, newest : newest + 1], chosen))
        chosen = keys.gather(2, held[..., None].expand(*held.shape, keys.shape[-1]))
        view = view_of(chosen, positions=held, attention=received[:, :, None], recent=v.parameter("recent"))
        kept = keep(view, AccumulatedAttention().score(view), budget)
        held, received = held.gather(-1, kept), received.gather(-1, kept)
        same(held[0], unpadded(expected))
        close(received[0], v["acc_score"][step][:, : held.shape[-1]], atol=1e-5)


def check_h2o_prefill(v):
    queries, keys = v["q"], v["k"]
    received = mass(causal_attention(queries, keys)).unflatten(1, (keys.shape[1], -1))
    view = view_of(keys, queries=queries, attention=received, recent=v.parameter("window"))
    scores = AccumulatedAttention(v.parameter("group_agg")).score(view)
    close(scores[..., : -view.recent], v["score"], atol=1e-5)
    same(keep(view, scores, v.parameter("capacity")), v["kept_sorted"])


def check_streamingllm(v):
    for row, (sinks, recent, length, coming) in enumerate(v["cfg_sink_recent_T_coming"].tolist()):
        budget = length
        if length + coming > sinks + recent:
            budget = sinks + max(0, recent - coming)
        view = view_of(torch.zeros(1, 1, length, 1), sinks=sinks)
        kept = keep(view, Recency().score(view), budget)[0, 0]
        assert kept.tolist() == v["kept"][row, : v["kept_len"][row]].tolist()


def check_adakv(v):
    view, scores, capacity = snapkv(v, per_query_head=not v.parameter("gqa"), capacity="base_capacity")
    close(scores[..., : -view.recent], v["score"])
    equal = torch.tensor([(capacity - view.recent) * scores.shape[1]])
    floor, normalise = v.parameter("floor"), "mass" if v.parameter("normalize") else "none"
    counts = counts_of(Adaptive(floor, normalise, "official"), scores, view.candidates, equal)
    kept = indices_of(selected_by(TopK(), scores, view.candidates, counts) | view.protected)[0]
    lengths, expected = v["head_lens"], v["kept_sorted"]
    assert counts_of(Adaptive(floor, normalise), scores, view.candidates, equal).sum() == equal
    if v["gap_global"] == 0:  # plateaus of equal scores: which head gets an entry is a matter of taste
        assert (counts.sum() + view.protected.sum() - lengths.sum()).abs() <= len(lengths)
        return
    same(counts[0] + view.recent, lengths)
    same(kept, expected)


def check_spec_adakv(v):
    scores = v["score"][None]
    window, capacity = v.parameter("window"), v.parameter("base_capacity")
    equal = torch.tensor([(capacity - window) * scores.shape[1]])
    everywhere = torch.ones_like(scores, dtype=torch.bool)
    floor, normalise = v.parameter("floor"), "mass" if v.parameter("normalize") else "none"

    def counts(share, rounding="conserve"):
        return counts_of(Adaptive(share, normalise, rounding), scores, everywhere, equal)[0]

    same(counts(0), v["topk_counts"])
    same(counts(floor, "official") + window, v["head_lens_official"])
    same(counts(floor) + window, v["head_lens_spec"])


def check_knorm(v):
    view = view_of(v["keys"], values=v["values"])
    close(KeyNorm().score(view), v["score"], atol=1e-4)
    close(KeyNorm().score(view_of(v["keys_pre_rope"])), v["score"], atol=1e-4)


def check_tova(v):
    queries, keys, prompt = v["q"], v["k"], v.parameter("prompt")
    held = torch.arange(prompt).expand(*keys.shape[:2], prompt)
    scorer = Attention(queries=1, shared=True)
    for step, expected in enumerate(v["kept_positions"]):
        newest = prompt + step - 1
        if step:
            held = torch.cat([held, torch.full_like(held[..., :1], newest)], -1)
        chosen = keys.gather(2, held[..., None].expand(*held.shape, keys.shape[-1]))
        view = view_of(chosen, positions=held, queries=queries[:, :, newest : newest + 1])
        held = held.gather(-1, keep(view, scorer.score(view), v.parameter("cache_size")))
        same(held, unpadded(expected)[:, None].expand_as(held))


CHECKS = {
    "finch": check_finch,
    "rkv": check_rkv,
    "rkv_similarity": check_rkv_similarity,
    "rkv_rounds": check_rkv_rounds,
    "decode_snapkv": check_decode_snapkv,
    "snapkv": check_snapkv,
    "snapkv_ties": check_snapkv_ties,
    "pyramidkv_budgets": check_pyramidkv_budgets,
    "spec_pyramidkv": check_spec_pyramidkv,
    "pyramidkv_kept": check_pyramidkv_kept,
    "h2o_decode": check_h2o_decode,
    "h2o_prefill": check_h2o_prefill,
    "streamingllm": check_streamingllm,
    "adakv": check_adakv,
    "spec_adakv": check_spec_adakv,
    "knorm": check_knorm,
    "tova": check_tova,
    "gkv": gkv.check_rounds,
    "gkv_similarity": gkv.check_similarity,
}
