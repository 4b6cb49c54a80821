"""Budgets of heads by a measured importance: HeadKV's, and SurfaceLogicKV's as the code of DiliLazyKV has it."""

import pytest
import torch

from kvpolicy.stages import AllocationRequest
from kvpolicy_plugins.allocators.headkv import HeadKV
from kvpolicy_plugins.allocators.surfacelogic import SurfaceLogic
from tests.golden.families import Vectors, cases, close, family_of, same

ROOM = 10**6  # published code gives heads more than they hold


@pytest.mark.parametrize("path", cases("test_head_budgets"), ids=lambda path: path.stem)
def test_published_results(path):
    vectors = Vectors(path)
    CHECKS[family_of(path.stem)](vectors)
    assert vectors.unread() == []


def divided(allocator, importance, base):
    """Candidates of each head, [L, H], `base` on average, where every query head has entries of its own."""
    layers, heads = importance.shape
    room = torch.full((layers, 1, heads), ROOM)
    total = torch.tensor([base * layers * heads])
    request = AllocationRequest(
        room, total, torch.zeros_like(room), torch.tensor([ROOM]), statistics=importance.double()[:, None]
    )
    return allocator.allocate(request)[:, 0]


def both(kind, importance, base, published, **given):
    """The published roundings exactly; with exact sums, each head within one entry and the rounding errors of all."""
    same(divided(kind(rounding="official", **given), importance, base), published)
    exact = divided(kind(**given), importance, base)
    assert exact.sum() == base * importance.numel()
    assert (exact - published).abs().max() <= 1


def check_headkv_budgets(v):
    base = v.parameter("base_capacity") - v.parameter("window")
    exponent = v.parameter("temp")
    for beta, published in zip(v["betas"].tolist(), v["head_capacity_excl_window"], strict=True):
        both(HeadKV, v["head_importance"], base, published, beta=beta, exponent=exponent)


def check_head_budgets(v):
    base = int(v["base_capacity"]) - int(v["window"])
    given = {"beta": float(v["beta"]), "exponent": float(v["temp"])}
    scores, attention = v["head_scores"], v["attn_last_row"]
    both(HeadKV, scores, base, v["headkv_capacity"], **given)
    both(SurfaceLogic, scores, base, v["dililazy_capacity"], **given)

    first, end = v["needle"].tolist()
    inside = torch.zeros(attention.shape[-1], dtype=torch.bool)
    inside[first:end] = True
    allocator = SurfaceLogic(top=int(v["topk"]))
    precision, recall = allocator.precision_recall(attention, inside)
    close(precision, v["weighted_precision"])
    close(recall, v["weighted_recall"])
    close(allocator.importance(attention, inside, end - first), v["infscore"])


CHECKS = {"headkv_budgets": check_headkv_budgets, "head_budgets": check_head_budgets}
