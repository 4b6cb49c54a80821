"""Leverage scores: on long and repetitive sequences, and on models whose rotation is not known."""

import attrs
import pytest
import torch
from torch.testing import assert_close

import kvpolicy
from kvpolicy.errors import PolicyError
from kvpolicy.plan.plan import compile_policy
from kvpolicy.stages import Geometry, Rotary
from kvpolicy_plugins.scorers.attention_free.leverage import Leverage
from tests.support.models import model
from tests.support.views import view_of

GEOMETRY = Geometry((0,), 4, 2, 8)
ROTARY = Rotary(1.0 / torch.tensor([1.0, 10.0, 100.0, 1000.0]))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("beside", [[], [{"use": "recency"}]])
def test_a_model_whose_rotation_is_not_known_is_refused(beside):
    """When the plan is made, by the place in the file."""
    spec = kvpolicy.load("leverage", score=[*beside, {"use": "leverage"}]).spec
    message = rf"score\[{len(beside)}\]: leverage needs the rotary embedding of the model, to undo it: it is not known"
    with pytest.raises(PolicyError, match=message):
        compile_policy(spec, GEOMETRY, "cpu", torch.float32)
    assert compile_policy(spec, GEOMETRY, "cpu", torch.float32, ROTARY).needs.rotary


def test_a_history_of_leverage_needs_the_rotation_too():
    spec = kvpolicy.load("leverage", score=[{"use": "history", "of": {"use": "leverage"}}]).spec
    with pytest.raises(PolicyError, match="rotary embedding"):
        compile_policy(spec, GEOMETRY, "cpu", torch.float32)


def test_a_configuration_is_enough_for_a_plan():
    assert kvpolicy.load("leverage").compile(model().config).rotary is not None
    assert kvpolicy.load("snapkv").compile(model().config).rotary is None


def test_a_view_without_the_rotation_says_what_to_declare():
    with pytest.raises(ValueError, match="declare it in the scorer's `needs`"):
        Leverage().score(view_of(normal(1, 1, 9, 8)))


def test_rotation_does_not_count():
    """Keys at other positions, which are the same before rotation, score the same with the same sketch."""
    plain, gaussian = normal(1, 2, 20, 8), normal(1, 1, 8, 5, seed=1)
    positions = torch.arange(20).expand(1, 2, 20)
    scores = []
    for places in (positions, positions * 3 + 11):
        view = view_of(ROTARY.rotate(plain, places), positions=places, rotary=ROTARY)
        scores.append(Leverage().sketched(view, gaussian))

    assert_close(*scores, atol=1e-5, rtol=1e-4)


def test_small_differences_count_beside_large_ones():
    """A few large directions in a long sequence: in float32 rounding of the Gram matrix would hide all others."""
    plain = 0.5 * normal(1, 1, 20_000, 32) + 3000 * normal(1, 1, 3, 32, seed=1)[:, :, torch.arange(20_000) % 3]
    gaussian = normal(1, 1, 32, 12, seed=2)
    scores = Leverage(12).sketched(view_of(plain, rotary=Rotary(torch.zeros(16))), gaussian)[0, 0].double()
    rows = (plain.double() - plain.double().mean(2, keepdim=True))[0, 0] @ gaussian[0, 0].double()

    assert_close(scores, torch.linalg.qr(rows).Q.square().sum(-1), atol=1e-5, rtol=0.02)
    assert_close(scores.sum(), torch.tensor(12.0).double(), atol=0.01, rtol=0)


def test_an_outlier_has_nearly_all_the_leverage_of_its_direction():
    keys = 0.01 * normal(1, 1, 50, 8)
    keys[0, 0, 17] = 30.0
    scores = Leverage(4).score(view_of(keys, rotary=Rotary(torch.zeros(4))))[0, 0]

    assert scores[17] > 0.95
    assert scores.argmax() == 17


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen_in_its_head_and_in_no_other(wrong):
    keys = normal(2, 2, 20, 8)
    expected = Leverage(4).score(view_of(keys, rotary=ROTARY))
    keys[1, 0, 5, 3] = wrong
    scores = Leverage(4).score(view_of(keys, rotary=ROTARY))

    assert scores[1, 0].isnan().all()
    assert_close(scores[0], expected[0])
    assert_close(scores[1, 1], expected[1, 1])


def test_empty_slots_count_nothing():
    keys = normal(1, 1, 20, 8)
    view = view_of(keys, lengths=torch.tensor([[15]]), rotary=ROTARY)
    other = attrs.evolve(view, keys=keys.masked_fill(~view.valid[..., None], 50.0))

    assert torch.equal(Leverage(4).score(other)[..., :15], Leverage(4).score(view)[..., :15])
