"""Fitted policies keep their recipe and never take more bytes than their share."""

from fractions import Fraction

import attrs
import pytest

import kvpolicy
from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.fit import fit
from kvpolicy.plan.explain import explain, full_bytes

SHIPPED = ["adakv", "blend", "gkv", "h2o", "pyramidkv", "rkv", "snapkv", "streaming_llm", "tova"]


@pytest.mark.parametrize("share", [Fraction(1, 10), Fraction(1, 4), Fraction(1, 2)])
@pytest.mark.parametrize("name", SHIPPED)
def test_bytes_stay_within_the_share_and_use_it_up(tiny, name, share):
    """At capacity, slack included, the share is not exceeded, and one more token everywhere would exceed it."""
    model, _ = tiny
    fitted = fit(kvpolicy.load(name), model, length=1024, share=share)
    plan = fitted.compile(model)
    limit, held = full_bytes(plan, 1024) * share, explain(plan, 1024).held_bytes
    one_more = plan.footprint.entry_bytes * plan.geometry.layers * plan.geometry.kv_heads

    assert held <= limit < held + one_more


@pytest.mark.parametrize("name", SHIPPED)
def test_only_sizes_change(tiny, name):
    """Plugins, weights and every other parameter stay as shipped."""
    model, _ = tiny
    shipped = kvpolicy.load(name)
    fitted = fit(shipped, model, length=1024, share=Fraction(1, 10))
    kinds = [(type(one.scorer), one.weight, one.normalise) for one in fitted.spec.score]

    assert kinds == [(type(one.scorer), one.weight, one.normalise) for one in shipped.spec.score]
    assert fitted.spec.allocate == shipped.spec.allocate
    assert fitted.spec.compress.prefill == shipped.spec.compress.prefill
    assert fitted.spec.compress.every == min(shipped.spec.compress.every, 12)
    assert fitted.digest != shipped.digest


def test_windows_are_scaled(tiny):
    """A quarter of the budget is recent at most; policies made of recency keep their proportions."""
    model, _ = tiny
    sizes = {"length": 1024, "share": Fraction(1, 10)}
    snapkv, h2o, streaming = (fit(kvpolicy.load(name), model, **sizes) for name in ("snapkv", "h2o", "streaming_llm"))

    assert snapkv.spec.protect.recent == snapkv.spec.budget.tokens // 4
    assert snapkv.spec.score[0].scorer.queries == snapkv.spec.budget.tokens // 12
    assert h2o.spec.protect.recent == h2o.spec.budget.tokens // 2
    assert streaming.spec.protect.total == streaming.spec.budget.tokens
    assert streaming.spec.protect.sinks == 4


def test_scorers_inside_scorers_are_scaled_too(tiny):
    """The window of a scorer that another one is built on."""
    model, _ = tiny
    fitted = fit(kvpolicy.load("gkv"), model, length=200, share=Fraction(1, 4))

    assert attrs.asdict(fitted.spec.score[0].scorer)["of"]["queries"] == 4


def test_no_room_is_an_error(tiny):
    """A share that holds not one entry beside the slack."""
    model, _ = tiny
    with pytest.raises(EvaluationError, match="snapkv: 1% of 100 tokens leaves no room"):
        fit(kvpolicy.load("snapkv"), model, length=100, share=Fraction(1, 100))
