"""Budgets of layers: nothing is lost, nothing is given twice."""

import math

import attrs
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kvpolicy.errors import PolicyError
from kvpolicy.plan.budgets import Budgets
from kvpolicy.plan.footprint import Footprint
from kvpolicy.spec.budget import Budget
from kvpolicy.spec.policy import Allocate, Compress, Protect
from kvpolicy.stages import AsIs, Column, Formats, Geometry
from kvpolicy_plugins.allocators.pyramid import Pyramid
from kvpolicy_plugins.allocators.uniform_layers import UniformLayers
from tests.support.policies import small

SPEC = small("snapkv").spec
ENTRY = 2 * 8 * 4 + 4  # key, value and position


def budgets_of(spec, layers):
    geometry = Geometry(tuple(range(layers)), 4, 2, 8)
    formats, pages = (Formats(AsIs(), AsIs()),) * layers, (None,) * layers
    columns = {"positions": Column((), torch.int32)}
    return Budgets(spec, geometry, Footprint(geometry, torch.float32, columns, formats, pages))


PARTS = st.integers(1, 100).map(lambda percent: f"{percent}%")


@st.composite
def budgets(draw, kinds=("tokens", "share", "size"), *, decoding=False):
    layers = draw(st.integers(1, 9))
    protect = Protect(draw(st.integers(0, 8) | PARTS), draw(st.integers(0, 8) | PARTS))
    allocator = draw(st.sampled_from([UniformLayers(), Pyramid(), Pyramid(beta=3)]))
    every = draw(st.integers(1, 200) if decoding else st.integers(1, 200) | st.just("never"))
    kind = draw(st.sampled_from(kinds))
    budget = {
        "tokens": st.integers(protect.total + 1, 3000).map(Budget.parse),
        "share": st.integers(1, 100).map(lambda share: Budget.parse(f"{share}%")),
        "size": st.integers(600_000, 3_000_000).map(lambda size: Budget.parse(f"{size}B")),
    }[kind]
    spec = attrs.evolve(
        SPEC,
        budget=draw(budget),
        protect=protect,
        compress=Compress(every=every),
        allocate=Allocate(layers=allocator, heads=SPEC.allocate.heads),
    )
    return budgets_of(spec, layers)


@given(budgets(), st.integers(1, 5000))
def test_layers_share_the_budget_exactly(given_budgets, seen):
    per_layer = given_budgets.per_layer(seen)
    average = min(given_budgets.average(seen), seen)
    assert sum(per_layer) == len(per_layer) * average
    assert all(min(sum(given_budgets.protected(seen)), seen) <= budget <= seen for budget in per_layer)


@given(budgets(), st.integers(1, 5000))
def test_a_budget_is_never_less_than_what_is_protected_nor_zero(given_budgets, seen):
    assert given_budgets.average(seen) >= max(1, given_budgets.spec.protect.total)


@given(budgets(), st.integers(1, 5000))
def test_what_is_protected_is_rounded_down_and_fits_into_the_budget(given_budgets, seen):
    protect, average = given_budgets.spec.protect, given_budgets.average(seen)
    found = given_budgets.protected(seen)
    exact = [
        one if isinstance(one, int) else math.floor(average * one.share) for one in (protect.sinks, protect.recent)
    ]
    assert sum(found) <= average
    assert all(0 <= one <= most for one, most in zip(found, exact, strict=True))
    assert list(found) == exact or sum(found) == average
    assert all(one == protected for one, protected in zip(exact, found, strict=True) if sum(exact) <= average)
    for one, protected in zip((protect.sinks, protect.recent), found, strict=True):
        assert not isinstance(one, int) or one == protected


@given(budgets(kinds=["share"]), st.integers(1, 5000))
def test_it_is_said_exactly_when_more_is_held_than_the_share(given_budgets, seen):
    share = given_budgets.spec.budget.share
    more = min(given_budgets.average(seen), seen) > max(1, math.floor(share * seen))
    assert bool(given_budgets.raised(seen)) == more


@given(budgets(kinds=["tokens", "size"]), st.integers(1, 5000))
def test_only_a_share_of_the_tokens_is_ever_raised(given_budgets, seen):
    assert not given_budgets.raised(seen)
    assert given_budgets.protected(seen) == given_budgets.protected(1)


@given(budgets(kinds=["share"]), st.integers(1, 5000))
def test_a_share_is_rounded_down(given_budgets, seen):
    share = given_budgets.spec.budget.share
    assert given_budgets.average(seen) == max(
        seen * share.numerator // share.denominator, given_budgets.spec.protect.total, 1
    )


@given(budgets(kinds=["size"]), st.integers(1, 5000))
def test_a_size_covers_all_layers_heads_and_the_slack(given_budgets, seen):
    heads = given_budgets.geometry.kv_heads
    slots = sum(budget + given_budgets.slack for budget in given_budgets.per_layer(seen)) * heads
    assert slots * ENTRY <= given_budgets.spec.budget.size


@given(budgets(decoding=True), st.integers(1, 2000))
def test_looking_ahead_gives_at_least_what_is_due_now(given_budgets, seen):
    now, ahead = given_budgets.per_layer(seen), given_budgets.ahead(seen)
    assert all(one <= other for one, other in zip(now, ahead, strict=True))
    if given_budgets.spec.budget.share is None:
        assert all(map(int.__ge__, ahead, given_budgets.per_layer(2 * seen)))


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 50))
def test_a_size_that_has_no_room_for_an_entry_is_refused_and_one_that_has_is_not(sinks, recent, every):
    assume(sinks + recent)
    least = (sinks + recent + 1 + every) * ENTRY * 4

    def of(size):
        spec = attrs.evolve(
            SPEC, budget=Budget(size=size), protect=Protect(sinks, recent), compress=Compress(every=every)
        )
        return budgets_of(spec, 2)

    with pytest.raises(PolicyError, match=f"at least {least} bytes"):
        of(least - 1)
    assert of(least).average(10**6) == sinks + recent + 1
