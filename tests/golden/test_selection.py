"""What is kept beside the highest scores is what the authors' own code kept, with the numbers that it drew."""

from typing import ClassVar

import attrs
import pytest
import torch
from torch import Tensor

import kvpolicy
from kvpolicy.plan.compress.step import compress_one
from kvpolicy.spec.policy import Weighted
from kvpolicy.stages import Scorer, SelectionRequest, View
from kvpolicy.stages.ordering import highest
from kvpolicy.stages.slots import indices_of
from kvpolicy_plugins.scorers.attention_based.attention import Attention
from kvpolicy_plugins.scorers.attention_free.key_norm import KeyNorm
from kvpolicy_plugins.scorers.shared.pooling import Pool
from kvpolicy_plugins.selectors.fair import Fair
from kvpolicy_plugins.selectors.kvcrush import KVCrush, spread
from kvpolicy_plugins.selectors.mass_segments import MassSegments
from kvpolicy_plugins.selectors.sample import Sample
from kvpolicy_plugins.selectors.topk import TopK
from kvpolicy_plugins.shared.blocks import in_blocks
from tests.golden.families import Vectors, cases, close, family_of, same
from tests.support.selecting import selected_by
from tests.support.views import view_of


@pytest.mark.parametrize("path", cases("test_selection"), ids=lambda path: path.stem)
def test_published_results(path):
    vectors = Vectors(path)
    CHECKS[family_of(path.stem)](vectors)
    assert vectors.unread() == []


@attrs.frozen(eq=False)
class Recorded(Scorer):
    """Scores that were recorded, [B, K, n], of the first n slots."""

    name: ClassVar[str] = "recorded"

    scores: Tensor

    def score(self, view: View) -> Tensor:
        missing = view.positions.shape[-1] - self.scores.shape[-1]
        return torch.nn.functional.pad(self.scores, (0, missing))


def kept_by(name: str, view: View, scores: Tensor, budget: int) -> Tensor:
    """Positions [B, K, budget] that the shipped policy keeps, given scores in place of its own."""
    spec = attrs.evolve(kvpolicy.load(name).spec, score=(Weighted(Recorded(scores)),))
    kept = compress_one(spec, view, [budget] * len(view.positions)).kept
    return view.positions.gather(-1, kept)


def entries_at(vectors: Tensor, positions: Tensor) -> Tensor:
    """Vectors [B, K, n, D] of the positions [B, K, n], of those of a whole sequence."""
    return vectors.gather(2, positions[..., None].expand(*positions.shape, vectors.shape[-1]))


def check_random_pp(v):
    """The code pins as much of the prompt as leaves room for one entry beside it; the policy pins all of it."""
    prompt, budget, residual, selected = (
        v.parameter(name) for name in ("prompt", "token_budget", "residual", "k_select")
    )
    keys, values = v["k"], v["v"]
    held = torch.arange(prompt).expand(*keys.shape[:2], prompt)
    lengths, events = [prompt], []
    for tokens in range(prompt + 1, prompt + len(v["cache_len_after_step"])):
        held = torch.cat([held, torch.full_like(held[..., :1], tokens - 1)], -1)
        if held.shape[-1] > budget and held.shape[-1] % residual == 0:
            same(held, v[f"positions_before_r{len(events)}"])
            pinned = held < min(prompt, selected - 1)
            entries = {"values": entries_at(values, held), "positions": held}
            view = view_of(entries_at(keys, held), **entries, recent=residual, pinned=pinned)
            held = kept_by("random", view, v[f"u_r{len(events)}"], budget)
            same(held, v[f"kept_positions_r{len(events)}"])
            events.append(tokens)
        lengths.append(held.shape[-1])
    same(torch.tensor(lengths), v["cache_len_after_step"])
    same(torch.tensor(events), v["trigger_total_len"])
    assert len(events) == v["rounds"]


def check_random_randkv(v):
    """A budget without the buffer; layers stand in the place of rows."""
    prompt, buffer, budget = (v.parameter(name) for name in ("prompt", "buffer", "budget"))
    v.parameter("seed"), v.text("p_request")  # of the draws, which are recorded
    held = torch.empty(v.parameter("layers"), v.parameter("heads"), 0, dtype=torch.int64)
    newest = -1
    for event, tokens in enumerate(v["trigger_total_len"].tolist()):
        new = torch.arange(newest + 1, tokens).expand(*held.shape[:2], -1)
        held, newest = torch.cat([held, new], -1), tokens - 1
        same(held, v[f"positions_before_r{event}"])
        view = view_of(torch.zeros(*held.shape, 1), positions=held, recent=buffer, pinned=held < prompt)
        drawn = (held[..., None] == v[f"drawn_positions_r{event}"][..., None, :]).any(-1)
        held = kept_by("random", view, drawn.float(), budget + buffer)
        same(held, v[f"kept_positions_r{event}"])
    assert event + 1 == v["rounds"]


def check_vase_attnv(v):
    """Each event by itself, on the cache in the order that the code left it in, which its pooling goes by."""
    budget, residual, sinks = (v.parameter(name) for name in ("token_budget", "residual", "n_sink"))
    reserved, kernel = v.parameter("n_large"), v.parameter("kernel")
    selector = Sample(reserved / budget, sinks)
    pool = Pool("average", kernel) if v.parameter("smooth") else Pool()
    scorer = Attention(residual, softmax="candidates", group_at="pooled", pool=pool)
    assert v.parameter("prompt") <= v["trigger_total_len"][0]
    for event, tokens in enumerate(v["trigger_total_len"].tolist()):
        held = v[f"positions_before_r{event}"].long()
        values = entries_at(v["v"], held)
        queries = v["q"][:, :, tokens - residual : tokens]
        view = view_of(entries_at(v["k"], held), values=values, queries=queries, recent=residual)
        scores, ranges = scorer.score(view), selector.second_scores(view)
        close(scores[..., :-residual], v[f"attn_score_r{event}"])
        close(ranges[..., :-residual], v[f"value_range_r{event}"])
        counts = torch.full(held.shape[:2], v.parameter("k_select"))
        request = SelectionRequest.of(view, scores, counts, ranges)
        exponentials = torch.nn.functional.pad(v[f"exp_draw_r{event}"], (0, residual), value=1.0)
        large = indices_of(selector.reserved(request))
        same(large, v[f"reserved_slots_r{event}"])
        kept = indices_of(selector.drawn(request, exponentials) | view.protected)
        same(held.gather(-1, kept).sort(-1).values, v[f"kept_sorted_r{event}"])
        same(v[f"kept_positions_cache_order_r{event}"].sort(-1).values, v[f"kept_sorted_r{event}"])
    assert event + 1 == v["rounds"]


def check_fair_eviction(v):
    """The two spans cover everything, and what the code scored within each is given; ramps of both compete."""
    spans = sorted((v["defense_span"].tolist(), v["sys_instr_span"].tolist()))
    keys = v["keys"]
    for name in ("values", "attentions", "window_size", "kernel_size"):
        v[name]  # what the scores given were made from
    positions = torch.arange(keys.shape[2]).expand(keys.shape[:3])
    everywhere = torch.ones_like(positions, dtype=torch.bool)
    regions = (positions >= spans[1][0]).to(torch.int8) + 1
    close(KeyNorm().score(view_of(keys)), v["score_knorm"])
    for share in v["ratios"].tolist():
        counts = torch.full(keys.shape[:2], int(keys.shape[2] * (1 - share)))
        for name in ("knorm", "observed", "snapkv", "tova", "streaming"):
            scores, expected = v[f"score_{name}"], v[f"kept_{name}_r{round(100 * share)}"]
            selector = TopK() if name == "streaming" else Fair("cumulative")
            kept = selected_by(selector, scores, everywhere, counts, regions=regions)
            for part in [everywhere] if name == "streaming" else [regions == 1, regions == 2]:
                # Of equal scores, which the code gives to a span's window, any may be kept; all others are the same.
                worth = [scores.masked_fill(~(mask & part), -torch.inf).sort(-1).values for mask in (kept, expected)]
                assert torch.equal(*worth)


def check_ams(v):
    """Each row of the file has a length and parameters of its own."""
    for case, row in enumerate(v["cfg_T_mass_minlen_maxlen_minkeep_keep_nseg_sum"].tolist()):
        tokens, shortest, longest, least, kept, count, total = (int(row[column]) for column in (0, *range(2, 8)))
        selector = MassSegments(mass=row[1], shortest=shortest, longest=longest, least=least)
        mass = v["mass"][case, :tokens][None, None]
        segments = selector.segments(mass, torch.ones_like(mass, dtype=torch.bool))
        same(segments.lengths[0, 0].cumsum(-1)[:count], v["segment_end"][case, :count])
        quotas = selector.quotas(segments, torch.tensor([[kept]]))[0, 0]
        same(quotas[:count], v["segment_budget"][case, :count])
        assert quotas.sum() == kept == total


def check_kvcrush_anchors(v):
    """Blocks to evict are given; where distances are equal, the code's sort keeps any of the blocks."""
    for case in range(int(v["cases"])):
        size, rescued = int(v[f"p_block_{case}"]), int(v[f"p_budget_{case}"])
        kind, scores = v.text(f"p_anchor_{case}").lower(), v[f"scores_{case}"][None, None].float()
        sound = torch.ones_like(scores, dtype=torch.bool)
        places = torch.arange(scores.shape[-1])[None, None]
        highest_half = highest(scores, sound, torch.full((1, 1), scores.shape[-1] // 2))
        same(highest_half[0, 0], v[f"indicators_{case}"])
        important, inside = (in_blocks(each, sound, places, size) for each in (highest_half, sound))
        selector = KVCrush(size, rescued, "mean" if kind == "random" else kind)
        request = SelectionRequest(scores, sound, torch.zeros(1, 1), places)
        anchor = v[f"anchor_{case}"].bool()
        if kind != "random":  # whose bits the generator of the code has drawn
            same(selector._anchor(request, important, inside).expand(1, 1, 1, size).flatten(), anchor)
        distances = selector.distances(important, inside, anchor)
        same(distances[0, 0], v[f"hamming_{case}"])
        evicted = torch.zeros_like(distances, dtype=torch.bool)
        evicted[..., v[f"evicted_blocks_{case}"]] = True
        found = spread(distances, evicted, torch.full((1, 1), rescued))[0, 0].nonzero()[:, 0]
        retained = v[f"retained_blocks_{case}"]
        if v[f"tie_free_{case}"]:
            same(found, retained.sort().values)
        same(distances[0, 0, found].sort().values, distances[0, 0, retained].sort().values)


CHECKS = {
    "kvcrush_anchors": check_kvcrush_anchors,
    "ams": check_ams,
    "fair_eviction": check_fair_eviction,
    "vase_attnv": check_vase_attnv,
    "random_pp": check_random_pp,
    "random_randkv": check_random_randkv,
}
