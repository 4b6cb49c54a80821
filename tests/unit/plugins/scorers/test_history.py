"""What a score remembers, and of whom."""

import attrs
import pytest
import torch
from torch.testing import assert_close

from kvpolicy.errors import ParameterError
from kvpolicy_plugins.scorers.attention_free.key_norm import KeyNorm
from kvpolicy_plugins.scorers.attention_free.value_norm import ValueNorm
from kvpolicy_plugins.scorers.history import History
from kvpolicy_plugins.scorers.shared.pooling import Pool
from tests.support.views import fresh_state, view_of


def view(values, scorer, **rest):
    tensor = torch.tensor(values)[None, None, :, None]
    made = view_of(torch.ones_like(tensor), values=tensor, **rest)
    return attrs.evolve(made, slot_state=fresh_state(scorer, made))


@pytest.mark.parametrize(("update", "expected"), [("max", [2, 1, 3]), ("mean", [2, 1, 3]), ("sum", [3, 1, 3])])
def test_old_and_new_are_joined(update, expected):
    scorer = History(ValueNorm(), update, 0.5, "none")
    layer = view([2.0, 0, 3], scorer)
    layer.slot_state["history"][..., :2] = 2.0  # the last one is new
    assert scorer.observe(layer)["history"].flatten().tolist() == expected


def test_protected_entries_have_no_history():
    scorer = History(ValueNorm())
    layer = view([4.0, 2, 8], scorer, recent=1)
    assert scorer.observe(layer)["history"].flatten().tolist() == [1, 0.5, -torch.inf]


def test_scaling_keeps_the_order_of_negative_scores():
    scorer = History(KeyNorm())
    layer = view([1.0, 1, 1], scorer)
    layer = attrs.evolve(layer, keys=torch.tensor([1.0, 2, 4])[None, None, :, None])
    assert scorer.observe(layer)["history"].flatten().tolist() == [-0.25, -0.5, -1]


def test_pooling_is_not_remembered():
    scorer = History(ValueNorm(), pool=Pool("max", 3))
    layer = view([4.0, 0, 8], scorer)
    layer = attrs.evolve(layer, slot_state=scorer.observe(layer))
    assert_close(layer.slot_state["history"].flatten(), torch.tensor([0.5, 0, 1]))
    assert_close(scorer.score(layer).flatten(), torch.tensor([0.5, 1, 1]))


def test_a_history_of_a_history_is_refused():
    with pytest.raises(ParameterError, match="without a history"):
        History(History(KeyNorm()))
