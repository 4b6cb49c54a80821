"""Attention Matching as the authors' code fits it: keys, log-votes and values of each KV head."""

import pytest
import torch

from kvpolicy_plugins.mergers.attention_matching import AttentionMatching
from kvpolicy_plugins.scorers.attention import Attention
from tests.golden.families import Vectors, cases, close, same
from tests.support.views import view_of


@pytest.mark.parametrize("path", cases("test_fits"), ids=lambda path: path.stem)
def test_published_results(path):
    v = Vectors(path)
    keys, values, queries = v["k"], v["v"], v["queries"]
    bias = v["attention_bias"] if "attention_bias" in v else torch.zeros(keys.shape[:2])
    assert v.text("p_c2_method") == "lsq"

    count, how = queries.shape[2], v.text("p_score_method")
    view = view_of(keys[None], queries=queries.flatten(0, 1)[None], log_votes=bias[None])
    scores = Attention(count, "candidates", how, "scores", how, causal=False).score(view)[0]
    indices = v["indices"]
    same(scores.topk(v.parameter("t")).indices, indices)

    own_keys, own_values = (taken(tensor, indices) for tensor in (keys, values))
    close(own_keys, v["keys_compact"], atol=0, rtol=0)
    logits = logits_of(queries, keys) + bias.double()[:, None]
    kept_bias = bias.double().gather(1, indices)[:, None]
    lower, upper = v.parameter("nnls_lower_bound"), v.parameter("nnls_upper_bound")
    merger = AttentionMatching(0, float(torch.tensor(upper).log()), v.parameter("nnls_iters"))
    assert lower == pytest.approx(1 / upper)
    own = logits_of(queries, own_keys)
    votes = merger.factors(logits, own + kept_bias, v["power_start"].double()).log()
    close(votes, v["log_bias"], atol=1e-4)
    outputs = logits.softmax(-1) @ values.double()
    found = merger.fitted_values(own + votes[:, None], outputs, own_values.double())  # published: not `kept_bias`
    assert ((found - v["values_compact"]).norm() / v["values_compact"].norm()) < 1e-3

    tested = v["test_queries"]
    fitted = logits_of(tested, own_keys) + votes[:, None]
    close((fitted.softmax(-1) @ found).unflatten(1, tested.shape[1:3]), v["out_compact"], atol=1e-4)
    close(fitted.logsumexp(-1).unflatten(1, tested.shape[1:3]), v["lse_compact"], atol=1e-4)
    full = logits_of(tested, keys) + bias.double()[:, None]
    close((full.softmax(-1) @ values.double()).unflatten(1, tested.shape[1:3]), v["out_full"], atol=1e-5)
    close(full.logsumexp(-1).unflatten(1, tested.shape[1:3]), v["lse_full"], atol=1e-5)
    assert v.unread() == []


def logits_of(queries, keys):
    """[K, G·n, T] float64: the queries of a KV head stacked."""
    return queries.double().flatten(1, 2) @ keys.double().mT / keys.shape[-1] ** 0.5


def taken(entries, indices):
    return entries.gather(1, indices[..., None].expand(*indices.shape, entries.shape[-1]))
