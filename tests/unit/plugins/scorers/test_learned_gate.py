"""The gate that a calibration measures: what it is to predict, the regression, and what it refuses."""

import attrs
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Geometry, Rotary, Sample, Site
from kvpolicy_plugins.scorers.attention_free import learned_gate
from kvpolicy_plugins.scorers.attention_free.learned_gate import LearnedGate, largest_attention
from tests.support.views import view_of

ROWS, HEADS, GROUP, TOKENS, DIM = 2, 2, 2, 24, 4
ROTARY = Rotary(torch.tensor([1.0, 0.1]))


def sample_of(seed=0, rotary=None, tokens=TOKENS):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(ROWS, HEADS * GROUP, tokens, DIM, generator=generator)
    keys, values = torch.randn(2, ROWS, HEADS, tokens, DIM, generator=generator)
    return Sample(Geometry((0,), HEADS * GROUP, HEADS, DIM), DIM**-0.5, rotary, queries, keys, values)


def expected_attention(sample, delay):
    """[S, K, T - delay], one query and one entry at a time."""
    queries, keys = sample.queries.double().numpy(), sample.keys.double().numpy()
    tokens = keys.shape[2]
    most = np.full((ROWS, HEADS, tokens - delay), -np.inf)
    for row in range(ROWS):
        for head in range(HEADS * GROUP):
            for query in range(tokens):
                logits = sample.scaling * keys[row, head // GROUP, : query + 1] @ queries[row, head, query]
                shares = logits - np.log(np.exp(logits).sum())
                for entry in range(query - delay + 1):
                    most[row, head // GROUP, entry] = max(most[row, head // GROUP, entry], shares[entry])
    return most


@pytest.mark.parametrize("delay", [0, 1, 7])
def test_the_largest_attention_of_queries_that_are_far_enough(delay, monkeypatch):
    monkeypatch.setattr(learned_gate, "_QUERIES", 5)  # several blocks
    sample = sample_of()
    found = largest_attention(sample, delay)
    expected = torch.from_numpy(expected_attention(sample, delay)).float()
    assert_close(found[..., : TOKENS - delay], expected, atol=1e-5, rtol=1e-5)
    assert (found[..., TOKENS - delay :] == -20).all()


@pytest.mark.parametrize("rotary", [None, ROTARY], ids=["rotated", "unrotated"])
def test_the_gate_is_a_ridge_regression_on_it(rotary):
    """As least squares with D more rows, which draw the weights to zero."""
    sample, delay, strength = sample_of(1, rotary), 5, 0.3
    scorer = LearnedGate("unrotated" if rotary else "rotated", delay, strength)
    (gate,) = scorer.calibrate([sample])
    target = expected_attention(sample, delay)
    for head in range(HEADS):
        keys = sample.keys[:, head, : TOKENS - delay]
        if rotary:
            keys = rotary.unrotate(keys, torch.arange(TOKENS - delay).expand(keys.shape[:2]))
        keys, wanted = keys.flatten(0, 1).double().numpy(), target[:, head].flatten()
        count = len(keys)
        ridge = strength * keys.var(0).mean()
        rows = np.concatenate([keys - keys.mean(0), np.sqrt(ridge * count) * np.eye(DIM)])
        weight = np.linalg.lstsq(rows, np.concatenate([wanted - wanted.mean(), np.zeros(DIM)]))[0]
        assert_close(gate["weight"][head].double(), torch.from_numpy(weight), atol=1e-5, rtol=1e-4)
        assert gate["bias"][head] == pytest.approx(wanted.mean() - weight @ keys.mean(0), abs=1e-4)


def test_it_predicts_what_the_keys_tell():
    """Where all queries are alike, attention follows from keys along them."""
    sample = sample_of(2, tokens=64)
    queries = torch.zeros_like(sample.queries)
    queries[..., 0] = 4.0
    (gate,) = LearnedGate("rotated", 8, 0.0).calibrate([attrs.evolve(sample, queries=queries)])
    assert (gate["weight"][:, 0] > 1.5).all()
    assert (gate["weight"][:, 1:].abs() < 0.5).all()


def test_short_texts_have_a_shorter_delay():
    sample = sample_of()
    short, half = (LearnedGate("rotated", delay).calibrate([sample])[0] for delay in (10**6, TOKENS // 2))
    assert torch.equal(short["weight"], half["weight"])


def test_scores_are_products_of_the_head():
    keys = torch.randn(1, HEADS, 3, DIM, generator=torch.Generator().manual_seed(5))
    gate = {"weight": torch.eye(DIM)[:HEADS], "bias": torch.tensor([0.5, -1.0])}
    found = LearnedGate("rotated").score(view_of(keys, calibration=gate))
    assert_close(found, torch.stack([keys[:, 0, :, 0] + 0.5, keys[:, 1, :, 1] - 1], 1))


@pytest.mark.parametrize(
    "gate",
    [
        {},
        {"weight": torch.zeros(HEADS, DIM)},
        {"weight": torch.zeros(HEADS, DIM), "bias": torch.zeros(1)},
        {"weight": torch.zeros(HEADS + 1, DIM), "bias": torch.zeros(HEADS)},
        {"weight": torch.zeros(HEADS, DIM), "bias": torch.full((HEADS,), torch.nan)},
    ],
)
def test_gates_of_another_shape_are_refused(gate):
    site = Site(sample_of().geometry, torch.float32, calibration=gate)
    with pytest.raises(ParameterError):
        LearnedGate("rotated").check_calibration(site)


def test_keys_before_rotation_need_the_rotation():
    with pytest.raises(ParameterError, match="rotary"):
        LearnedGate().calibrate([sample_of()])
    assert LearnedGate().needs().rotary
    assert not LearnedGate("rotated").needs().rotary
