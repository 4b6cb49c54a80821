"""RPC as the authors' code has it: scores, what is kept, and where periods are whole, when and how many."""

import pytest
import torch

import kvpolicy
from kvpolicy.cache.trigger import entries_allowed
from kvpolicy.plan.plan import compile_policy
from kvpolicy.stages import Geometry
from kvpolicy_plugins.scorers.attention_based.attention import Attention
from kvpolicy_plugins.scorers.shared.pooling import Pool
from tests.golden.families import Vectors, cases, close, same
from tests.support.views import keep, view_of

POOLS = {"maxpool": "max", "avgpool": "average", "none": "none"}


@pytest.mark.parametrize("path", cases("test_rpc"), ids=lambda path: path.stem)
def test_published_results(path):
    v = Vectors(path)
    all_keys, prompt, recent = v["k_all"], v.parameter("prompt"), v.parameter("R")
    period, ratio, share, queries = v.parameter("P"), v.parameter("c"), v.parameter("T"), v["q_rounds"]
    over_all = {"all": True, "group": False}[v.text("p_aggregation")]
    pool = Pool(POOLS[v.text("p_pooling")], v.parameter("kernel"))
    scorer = Attention(recent, softmax="candidates", reduce="sum", shared=over_all, pool=pool)
    spec = kvpolicy.load(
        "rpc",
        budget=f"{100 / ratio:.6f}% of generated",
        protect={"prompt": True, "recent": recent},
        compress={"prefill": False, "every": period - share},
    ).spec
    plan = compile_policy(
        spec, Geometry((0,), queries.shape[2], all_keys.shape[1], all_keys.shape[3]), "cpu", torch.float32
    )
    held, least = torch.arange(prompt + recent).expand(*all_keys.shape[:2], -1), prompt + recent
    for index, window in enumerate(queries):
        seen, kept = least + (index + 1) * period, least + (index + 1) * share
        held = torch.cat([held, torch.arange(seen - period, seen).expand(*held.shape[:2], -1)], -1)
        assert held.shape[2] == int(v["trigger_len"][index])
        if period == ratio * share:
            assert plan.budgets.entries(0, seen, least) == kept
            assert held.shape[2] > entries_allowed(plan, 0, seen, decoding=True, least=least)
            assert held.shape[2] - 1 <= entries_allowed(plan, 0, seen - 1, decoding=True, least=least)
        chosen = all_keys.gather(2, held[..., None].expand(*held.shape, all_keys.shape[-1]))
        view = view_of(chosen, positions=held, queries=window, recent=recent, pinned=held < prompt)
        scores = scorer.score(view)
        published = v[f"score_r{index}"]
        close(scores[:, : published.shape[1], prompt:-recent], published)
        held = held.gather(-1, keep(view, scores, kept))
        same(held, v[f"kept_positions_r{index}"])
    assert v.unread() == []
