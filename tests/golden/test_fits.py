"""Attention Matching as the authors' code fits it: keys, log-votes and values of each KV head."""

import math

import attrs
import pytest
import torch

from kvpolicy.stages import SelectionRequest
from kvpolicy_plugins.mergers.attention_matching import AttentionMatching
from kvpolicy_plugins.scorers.attention_based.attention import Attention
from kvpolicy_plugins.selectors.omp import OMP
from tests.golden.families import Vectors, cases, close, family_of, same
from tests.support.views import view_of


@pytest.mark.parametrize("path", cases("test_fits"), ids=lambda path: path.stem)
def test_published_results(path):
    v = Vectors(path)
    keys, values, queries = v["k"], v["v"], v["queries"]
    bias = v["attention_bias"] if "attention_bias" in v else torch.zeros(keys.shape[:2])
    assert v.text("p_c2_method") == "lsq"

    view = view_of(keys[None], queries=queries.flatten(0, 1)[None], log_votes=bias[None])
    indices, upper = v["indices"], v.parameter("nnls_upper_bound")
    CHOICES[family_of(path.stem)](v, view, indices)

    own_keys, own_values = (taken(tensor, indices) for tensor in (keys, values))
    close(own_keys, v["keys_compact"], atol=0, rtol=0)
    logits = logits_of(queries, keys) + bias.double()[:, None]
    kept_bias = bias.double().gather(1, indices)[:, None]
    merger = AttentionMatching(0, math.log(upper), v.parameter("nnls_iters"))
    own = logits_of(queries, own_keys)
    start = v["power_start"].double()
    votes = merger.factors(logits, own + kept_bias, start if start.shape[-1] else None).log()
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


def highest_attention(v, view, indices):
    """The keys with the highest attention, in its order."""
    how = v.text("p_score_method")
    scores = Attention(view.queries.shape[2], "candidates", how, "scores", how, causal=False).score(view)[0]
    same(scores.topk(v.parameter("t")).indices, indices)
    assert v.parameter("nnls_lower_bound") == pytest.approx(1 / v.parameter("nnls_upper_bound"))


def matching_pursuit(v, view, indices):
    """Keys chosen one by one, or some at a time, in their order; then as what a policy selects."""
    assert v.parameter("nnls_iters") == 0, "factors are clamped least squares while keys are chosen"
    selector = OMP(
        queries=view.queries.shape[2],
        per_step=v.parameter("k_choice", 1),
        refit_every=v.parameter("nnls_interval", 1),
        ridge=0,
        bound=math.log(v.parameter("nnls_upper_bound")),
        drop_below=v.parameter("drop_key_beta_cutoff", -27),
    )
    # All queries of the file see all keys: in a cache they have come behind them.
    later = attrs.evolve(view, query_positions=torch.full((1, view.queries.shape[2]), 10**6))
    exponentials = selector.second_scores(later)
    counts = torch.full(view.keys.shape[:2], v.parameter("t"))
    picks = selector.picks(exponentials[0], later.candidates[0], counts[0])
    for head, expected in zip(picks, indices, strict=True):
        same(head[head >= 0], expected)
    scores = torch.rand(later.positions.shape, generator=torch.Generator().manual_seed(0))  # count for nothing
    chosen = selector.select(SelectionRequest.of(later, scores, counts, exponentials))
    for head, expected in zip(chosen[0], indices, strict=True):
        same(head.nonzero()[:, 0], expected.sort().values)


CHOICES = {"attention_matching_hak": highest_attention, "attention_matching_omp": matching_pursuit}


def logits_of(queries, keys):
    """[K, G·n, T] float64: the queries of a KV head stacked."""
    return queries.double().flatten(1, 2) @ keys.double().mT / keys.shape[-1] ** 0.5


def taken(entries, indices):
    return entries.gather(1, indices[..., None].expand(*indices.shape, entries.shape[-1]))
