"""Scorers that look at keys and values alone give what published code gave: kvpress, and VaSE by its authors."""

import json

import attrs
import pytest
import torch
from torch.nn.functional import pad

import kvpolicy
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer
from kvpolicy.plan.plan import compile_policy
from kvpolicy.spec.policy import Weighted
from kvpolicy.stages import Geometry, Rotary
from kvpolicy_plugins.scorers.attention_based.chunk_attention import ChunkAttention
from kvpolicy_plugins.scorers.attention_free.cur import Cur
from kvpolicy_plugins.scorers.attention_free.keydiff import KeyDiff
from kvpolicy_plugins.scorers.attention_free.lagkv import LagKV
from kvpolicy_plugins.scorers.attention_free.leverage import Leverage
from kvpolicy_plugins.scorers.shared.pooling import Pool
from tests.golden.families import Vectors, cases, close, family_of, same
from tests.support.driving import feed
from tests.support.views import keep, view_of

LEVERAGES = {"kv_avg": "average", "kv_product": "product"}


@pytest.mark.parametrize("path", cases("test_geometric"), ids=lambda path: path.stem)
def test_published_results(path):
    vectors = Vectors(path)
    CHECKS[family_of(path.stem)](vectors)
    assert vectors.unread() == []


def layer_of(v):
    return view_of(v["keys"], values=v["values"])


def before_rotation(v):
    return view_of(v["keys_pre_rope"], values=v["values"])


def scores_and_settings(v):
    """Of each run in the file, its scores and what differs from the defaults of kvpress."""
    for name in v.like("score_*"):
        yield v[name], json.loads(v.text(name.replace("score", "cfg", 1)))


def check_keydiff(v):
    close(KeyDiff().score(layer_of(v)), v["score"])
    assert (KeyDiff().score(before_rotation(v)) - v["score"]).abs().max() > 1e-3  # keys are compared as cached


def check_lagkv(v):
    rotated_back = before_rotation(v)
    for expected, settings in scores_and_settings(v):
        sinks, lag, cross = (settings.pop(name, None) for name in ("n_sink", "lag_size", "cross_scoring"))
        assert not settings
        scorer = LagKV(4 if sinks is None else sinks, lag or 128, bool(cross))
        close(scorer.score(layer_of(v)), expected)
        if scorer.cross and v["keys"].shape[2] >= scorer.sinks + 2 * scorer.lag:  # keys are compared as cached
            assert (scorer.score(rotated_back) - expected).abs().max() > 1e-4


def check_cur(v):
    for expected, settings in scores_and_settings(v):
        sinks, window = settings.pop("num_sinks", 4), settings.pop("local_window_size", 16)
        leverage = settings.pop("leverage_type", "kv_product")
        local = settings.pop("use_local_approximation", True)
        assert not settings
        scorer = Cur(LEVERAGES.get(leverage, leverage), window if local else 0)
        for view in (layer_of(v), before_rotation(v)):  # rotation changes no norm
            close(scorer.score(view)[..., sinks:], expected[..., sinks:])
        assert (expected[..., :sinks] == 1).all()


def check_vase_dkv(v):
    """Each event stands alone. The code keeps slots in the order of their scores, and sinks by a score of 1."""
    scorer = Cur(rank=v.parameter("rank"), window=0)
    budget, recent, sinks = (v.parameter(name) for name in ("token_budget", "residual", "n_sink"))
    assert v.parameter("k_select") == budget - recent
    assert v["q"].shape[2] >= int(v["trigger_total_len"].max()) > v.parameter("prompt")
    for event in range(int(v["rounds"])):
        held, slots = v[f"positions_before_r{event}"].long().sort(-1)
        assert int(held.max()) == v["trigger_total_len"][event] - 1
        keys, values = (v[name].gather(2, held[..., None].expand(*held.shape, v[name].shape[-1])) for name in "kv")
        view = view_of(keys, values=values, positions=held, sinks=sinks, recent=recent)
        scores = scorer.sketched(view, v[f"gauss_r{event}"])
        kept = held.gather(-1, keep(view, scores, budget))
        same(kept, v[f"kept_sorted_r{event}"])
        same(v[f"kept_positions_cache_order_r{event}"].sort(-1).values, kept)

        before = held.shape[-1] - recent  # whose scores sum to 1 in the code
        shares = scores[..., :before] / scores[..., :before].sum(-1, keepdim=True)
        expected = v[f"score_r{event}"].gather(-1, slots[..., :before])
        close(shares[..., sinks:], expected[..., sinks:])
        assert (expected[..., :sinks] == 1).all()


def check_compactor(v):
    """Leverage, attention within chunks, and the score of the whole method."""
    settings = json.loads(v.text("cfg"))
    keys, values, rotary, sketch = v["keys"], v["values"], Rotary(v["inv_freq"]), v["Phi"]
    scorer, chunk = Leverage(settings["sketch_dimension"]), settings["chunk_size"]
    view = view_of(keys, values=values, rotary=rotary)
    close(view.unrotated_keys, v["keys_pre_rope"])
    leverage = scorer.sketched(view, sketch)
    close(leverage, v["leverage_raw"])
    close(standardised(leverage), v["leverage_z"], atol=1e-5)
    pool = Pool("average", 3)
    attention = ChunkAttention(chunk, 0, zeros=True, pool=pool)
    layer = layer_that_saw(v, attention, keys.shape[2])
    close(1 + layer.slot_state["excess"], v["noncausal_raw"].unflatten(1, (keys.shape[1], -1)).mean(2))
    close(standardised(attention.score(layer)), v["noncausal_score"], atol=1e-5)
    as_long_as_it_is = layer_that_saw(v, attrs.evolve(attention, zeros=False), keys.shape[2])
    differs = (as_long_as_it_is.slot_state["excess"] - layer.slot_state["excess"]).abs().amax((0, 1))
    assert (differs > 1e-3).tolist() == [
        position >= keys.shape[2] // chunk * chunk for position in range(keys.shape[2])
    ]

    middle = slice(settings["sink_size_start"], keys.shape[2] - settings["sink_size_end"])
    positions = torch.arange(keys.shape[2])[middle].expand(*keys[:, :, middle].shape[:3])
    view = view_of(keys[:, :, middle], positions=positions, rotary=rotary)
    ends = settings["sink_size_start"], settings["sink_size_end"]
    attention = ChunkAttention(chunk, ends[0], zeros=True, pool=pool)
    votes = attention.score(layer_that_saw(v, attention, middle.stop))[..., ends[0] :]
    blended = settings["blending"] * standardised(scorer.sketched(view, sketch)) + standardised(votes)
    close(pad(blended, ends, value=float(blended.max())), v["compactor_score"], atol=1e-5)
    hidden, length = v["hidden_states"], keys.shape[2]
    for weights, vectors in (("wq", "queries_pre_rope"), ("wk", "keys_pre_rope"), ("wv", "values")):
        close(hidden @ v[weights].T, v[vectors].transpose(1, 2).flatten(2), atol=1e-5)
    one = torch.cat([torch.ones(length, keys.shape[-1] // 2), torch.zeros(length, keys.shape[-1] // 2)], -1)
    turned = rotary.rotate(one, torch.arange(length))
    close(turned, torch.cat([half.chunk(2, -1)[0] for half in (v["cos"][0], v["sin"][0])], -1))
    assert {"rope_theta", "attentions", "wo"} <= set(v.unread())  # of the rest of the layer
    _ = v["rope_theta"], v["attentions"], v["wo"]


def standardised(scores):
    """To mean 0 and deviation 1 over the whole batch, as in kvpress; a policy does it head by head."""
    return (scores - scores.mean()) / scores.std()


def layer_that_saw(v, scorer, count):
    """The view of a layer that has had the first tokens in one forward; the tokens before the first chunk are sinks."""
    spec = kvpolicy.load("compactor", protect={"sinks": scorer.sinks, "recent": 0}).spec
    spec = attrs.evolve(spec, score=(Weighted(scorer),))
    heads, query_heads, dim = v["keys"].shape[1], v["queries_rope"].shape[1], v["keys"].shape[-1]
    plan = compile_policy(spec, Geometry((0,), query_heads, heads, dim), "cpu", torch.float32)
    layer = PolicyLayer(plan, 0)
    feed(layer, *(v[name][:, :, :count] for name in ("keys", "values", "queries_rope")))
    layer.before_compression()
    view = layer.view(range(v["keys"].shape[0]))
    return view.with_state({"excess": view.slot_state["score[0].excess"]})


CHECKS = {
    "keydiff": check_keydiff,
    "lagkv": check_lagkv,
    "cur": check_cur,
    "compactor": check_compactor,
    "vase_dkv": check_vase_dkv,
}
