"""Scorers by statistics of queries, which are calibrated or observed, with those of published results."""

import json

import pytest
import torch

from kvpolicy.stages import Geometry, Rotary
from kvpolicy_plugins.scorers.attention_based.expected_attention import ExpectedAttention
from kvpolicy_plugins.scorers.attention_based.q_filters import QFilters
from kvpolicy_plugins.scorers.attention_based.triattention import TriAttention
from tests.golden.families import Vectors, cases, close, family_of
from tests.support.views import view_of


@pytest.mark.parametrize("path", cases("test_calibrated"), ids=lambda path: path.stem)
def test_published_results(path):
    vectors = Vectors(path)
    CHECKS[family_of(path.stem)](vectors)
    assert vectors.unread() == []


def check_qfilters(v):
    """Published filters point the other way, and their projection is subtracted."""
    keys, layer = v["keys"], int(v["layer_idx"])
    assert v["values"].shape == v["keys_pre_rope"].shape == keys.shape
    view = view_of(keys, calibration={"filter": -v["q_filters"][layer]})
    close(QFilters().score(view), v["score"])


def check_triattention(v):
    keys, frequencies, now = v["k_rotated"], v["inv_freq"], v.parameter("round_start")
    heads, pairs = v["q_mean_real"].shape
    rotary = Rotary(frequencies.float())
    positions = v["positions"]
    close(rotary.unrotate(keys, positions), v["k_unrotated_recovered"], atol=1e-4)
    furthest = v.parameter("max_offset")
    assert v["offsets"].tolist() == [2**power for power in range(furthest.bit_length())]
    statistics = {
        "real": v["q_mean_real"],
        "imaginary": v["q_mean_imag"],
        "length": v["q_abs_mean"],
        "rest": torch.zeros(heads, keys.shape[1] - 2 * pairs),
    }
    # One more entry says what the newest position is; its own score is not looked at.
    shown = torch.cat([keys, torch.zeros_like(keys[:1])])[None, None]
    places = torch.cat([positions, torch.tensor([now - 1])])[None, None]
    geometry = Geometry((0,), heads, 1, keys.shape[1])
    view = view_of(shown, positions=places, geometry=geometry, rotary=rotary, calibration=statistics)
    over = v.text("p_aggregation")
    tolerance = 1e-3 if furthest < 2**16 else 0.05
    close(TriAttention(furthest, over).logits(view)[0, 0, :, :-1], v["score"], atol=tolerance)
    both = TriAttention(furthest, over).logits(view) - TriAttention(furthest, over, norm_term=False).logits(view)
    close(both[0, 0, :, :-1], v["score_no_trig"], atol=tolerance)


def check_expected_attention(v):
    """Scores and statistics of prompts, by the queries of all that follows the sinks."""
    keys, values, raw = v["keys"], v["values"], v["queries_pre_rope"]
    heads, dim = raw.shape[1], raw.shape[3]
    rotary = Rotary(v["inv_freq"].float())
    places = torch.arange(keys.shape[2]).expand(*raw.shape[:3])
    close(rotary.rotate(raw, places), v["queries_rope"], atol=1e-5)
    close(rotary.unrotate(keys, places[:, : keys.shape[1]]), v["keys_pre_rope"], atol=1e-5)
    close(raw, (v["hidden_states"] @ v["wq"].T).unflatten(-1, (heads, dim)).transpose(1, 2), atol=1e-5)
    for unused in ("attentions", "wo", "wk", "wv", "cos", "sin", "rope_theta"):
        assert v[unused].isfinite().all()
    for name in v.like("cfg_*"):
        case, given = name.removeprefix("cfg_"), json.loads(v.text(name))
        sinks = given["n_sink"]
        scorer = ExpectedAttention(
            keys.shape[2],
            future=given["n_future_positions"],
            covariance=given.get("use_covariance", True),
            value_norm=given.get("use_vnorm", True),
            epsilon=given.get("epsilon", 0.0),
        )
        view = view_of(keys, values=values, queries=v["queries_rope"], rotary=rotary, sinks=sinks)
        mean, covariance = scorer.statistics_of(view)
        close(mean, v[f"mu_{case}"], atol=1e-5)
        assert (covariance is None) == (f"cov_{case}" not in v)
        if covariance is not None:
            close(covariance, v[f"cov_{case}"], atol=1e-5)
        close(scorer.score(view)[..., sinks:], v[f"score_{case}"][..., sinks:], atol=1e-5)


CHECKS = {
    "expected_attention": check_expected_attention,
    "qfilters": check_qfilters,
    "triattention": check_triattention,
}
