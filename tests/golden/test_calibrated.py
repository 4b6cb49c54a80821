"""Scorers that are calibrated on a model, with statistics as published results had them."""

import pytest
import torch

from kvpolicy.stages import Geometry, Rotary
from kvpolicy_plugins.scorers.q_filters import QFilters
from kvpolicy_plugins.scorers.triattention import TriAttention
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


CHECKS = {"qfilters": check_qfilters, "triattention": check_triattention}
