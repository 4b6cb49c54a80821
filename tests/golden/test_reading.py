"""RocketKV, both stages as the authors' code has them, and the sizes that its rule gives."""

import math

import pytest
import torch

import kvpolicy
from kvpolicy.stages import Geometry, ReadRequest, Site
from kvpolicy.stages.conformance.read_requests import complete_groups, newest_group
from kvpolicy_plugins.readers.chunk_topk import ChunkTopK
from kvpolicy_plugins.scorers.attention_based.attention import Attention
from kvpolicy_plugins.scorers.shared.pooling import Pool
from tests.golden.families import Vectors, cases, close, family_of, same
from tests.support.views import keep, view_of


@pytest.mark.parametrize("path", cases("test_reading"), ids=lambda path: path.stem)
def test_published_results(path):
    vectors = Vectors(path)
    CHECKS[family_of(path.stem)](vectors)
    assert vectors.unread() == []


def check_rocketkv(v):
    queries, keys, values, prompt = v["q"], v["k"], v["v"], v.parameter("prompt")
    group = queries.shape[1] // keys.shape[1]
    ratio, dim = v.parameter("compression_ratio"), keys.shape[3]
    chunk = v.parameter("chunk")
    assert chunk == min(math.ceil(math.sqrt(ratio)), ratio)
    assert v.parameter("r") == int(dim * chunk / ratio)
    held = first_stage(v, queries[:, :, :prompt], keys[:, :, :prompt])
    reader = ChunkTopK(chunk, v.parameter("r") / dim, v.parameter("topk"))
    for step in range(int(v["decode_steps"])):
        newest = prompt + step
        held = torch.cat([held, torch.full_like(held[..., :1], newest)], -1)
        own_keys, own_values = (tensor.gather(2, held[..., None].expand(*held.shape, dim)) for tensor in (keys, values))
        query = queries[:, :, newest]
        request = request_of(reader, query, own_keys)
        grouped = query.unflatten(1, (-1, group))
        same(reader.best_channels(grouped), v[f"channels_s{step}"])
        close(reader.estimates(request), v[f"approx_prob_s{step}"])
        chosen = reader.choose(request)
        same(chosen, v[f"read_slots_s{step}"])
        index = chosen[..., None].expand(*chosen.shape, dim)
        logits = dim**-0.5 * grouped @ own_keys.gather(2, index).mT
        close((logits.softmax(-1) @ own_values.gather(2, index)).flatten(1, 2), v[f"out_s{step}"], atol=1e-5)


def first_stage(v, queries, keys):
    """Positions that stay of the prompt, [B, K, n]."""
    window = v.parameter("window")
    scorer = Attention(window, reduce="sum", group="sum", pool=Pool("max", v.parameter("kernel")))
    view = view_of(keys, queries=queries[:, :, -window:], recent=window)
    scores = scorer.score(view)
    close(scores[..., :-window], v["score"])
    kept = keep(view, scores, v.parameter("budget"))
    same(kept, v["kept_sorted"])
    return kept


def request_of(reader, query, keys):
    """A decode step over keys [B, K, T, D], the newest among them."""
    geometry = Geometry((0,), query.shape[1], keys.shape[1], keys.shape[3])
    positions = torch.arange(keys.shape[2]).expand(keys.shape[:3])
    page = reader.pages(Site(geometry, keys.dtype))
    pages = complete_groups(page, keys[:, :, :-1], positions[:, :, :-1])  # the newest has come since
    newest = newest_group(page, keys, torch.full(keys.shape[:2], keys.shape[2]))
    last = positions[:, 0, -1]
    return ReadRequest(query, last, positions, geometry, pages=pages, newest_page=newest)


def check_rocketkv_budgets(v):
    """The rule, in the versions of both published codes, and that the shipped policy follows the first."""
    for row, (length, tokens, generated, dim) in enumerate(v["cfg_L_budget_maxnew_headdim"].tolist()):
        for name, exact in (("accuracy", True), ("gptfast", False)):
            published = v[f"capacity_prompt_chunk_r_topk_{name}_code"][row].tolist()
            assert list(sizes(length, tokens, generated, dim, exact=exact)) == published
    policy = kvpolicy.load("rocketkv").spec
    _, prompt, chunk, channels, read = sizes(131072, 256, 64, 128, exact=True)
    assert (policy.budget.tokens, policy.read.chunk, policy.read.budget) == (prompt, chunk, read)
    assert int(128 * policy.read.channels) == channels


def sizes(length, tokens, generated, dim, *, exact):
    """Capacity, prompt budget, chunk, channels and entries read, of a budget of `tokens` entries read a step."""
    ratio = max(1, length / tokens)
    capacity = int(length / ratio ** min(0.2 + 0.06 * math.log2(ratio), 0.8))
    if exact:
        capacity = max(capacity, min(2 * generated, length))
    rest = max(1, capacity / tokens)
    chunk = math.ceil(math.sqrt(rest))
    chunk = chunk if chunk <= rest else 1
    channels = dim * chunk / rest
    prompt = capacity - generated
    rounded = int(channels) if exact else round(channels)
    return capacity, prompt if exact else min(prompt, length - generated), chunk, rounded, tokens // 2


CHECKS = {"rocketkv": check_rocketkv, "rocketkv_budgets": check_rocketkv_budgets}
