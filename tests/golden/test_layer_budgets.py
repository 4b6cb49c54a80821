"""Budgets of layers that follow from their attention, as the authors' code gives them."""

import pytest
import torch

from kvpolicy.stages import AllocationRequest
from kvpolicy_plugins.allocators.cake import Cake
from kvpolicy_plugins.scorers.attention_based.attention import Attention
from kvpolicy_plugins.scorers.shared.pooling import Pool
from tests.golden.families import Vectors, cases, close, family_of, same
from tests.support.views import keep, view_of


@pytest.mark.parametrize("path", cases("test_layer_budgets"), ids=lambda path: path.stem)
def test_published_results(path):
    vectors = Vectors(path)
    CHECKS[family_of(path.stem)](vectors)
    assert vectors.unread() == []


def divided(preferences, total, room, **temperatures):
    """Entries of each layer, of `total` in all, where none holds more than `room`."""
    layers = len(preferences)
    request = AllocationRequest(
        room=torch.full((layers, 1, 1), room),
        total=torch.tensor([min(total, layers * room)]),
        protected=torch.zeros(layers, 1, 1, dtype=torch.int64),
        tokens=torch.tensor([room]),
        statistics=preferences.double().log()[:, None, None],
    )
    return Cake(**temperatures).allocate(request).flatten()


def check_cake_layers(v):
    queries, keys, window = v["q_window"], v["k"], v.parameter("window")
    tau = {"tau1": v.parameter("tau1"), "tau2": v.parameter("tau2")}
    views = [view_of(k[None], queries=q[None], recent=window) for q, k in zip(queries, keys, strict=True)]
    assert v["entropy"].shape == v["variance"].shape == (len(views),)
    close(v["entropy"] ** (1 / tau["tau1"]) * v["variance"] ** (1 / tau["tau2"]), v["pref"], rtol=1e-6)
    found = torch.cat([Cake(**tau).statistics(view) for view in views])
    close(found[:, 0].exp(), v["pref"], rtol=1e-3)
    assert torch.equal(found[:, :1].expand_as(found), found)
    scorer = Attention(
        window, deviation=v.parameter("gamma"), spread="variance", group_at="pooled", pool=Pool("average", 5)
    )
    scores = [scorer.score(view) for view in views]
    close(torch.cat(scores)[..., :-window], v["evict_score"], rtol=1e-3)
    total, room = (v.parameter("cache") - window) * len(views), keys.shape[2] - window
    budgets = divided(v["pref"], total, room)
    published = v["budgets_noncascading"]
    assert budgets.sum() == total == published.sum()
    assert (budgets - published).abs().max() <= 1  # they are rounded down there, and what is left is spread
    for layer, (view, own) in enumerate(zip(views, scores, strict=True)):
        kept = v["kept_sorted_cascading"][layer]
        count = int(v["budget_history_cascading"][-1, layer])
        assert int((kept >= 0).sum(-1)[0]) == count + window
        same(keep(view, own, count + window)[0], kept[:, : count + window])


def check_cake_adjust(v):
    """What layers cannot use is spread evenly there, and by preference here."""
    for preferences, (layers, total, room, spent), published in zip(
        v["pref"], v["cfg_L_total_maxlen_sumout"].tolist(), v["budgets"], strict=True
    ):
        budgets, theirs = divided(preferences[:layers], total, room), published[:layers]
        assert budgets.sum() == min(total, layers * room)
        assert budgets.max() <= room
        assert int(theirs.sum()) == spent
        shares = preferences[:layers] / preferences[:layers].sum() * total
        if shares.max() <= room and spent == total:  # nothing is spread but what rounding leaves
            assert (budgets - theirs).abs().max() <= 1


CHECKS = {"cake_layers": check_cake_layers, "cake_adjust": check_cake_adjust}
