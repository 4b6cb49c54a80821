"""What is not finite ranks last of all, and no plugin remembers it for good."""

import warnings

import attrs
import pytest
import torch

import kvpolicy
from kvpolicy.errors import NonFiniteScoreWarning
from kvpolicy.plan.forward_observers import ATTENTION, forward_observers_of, state_name
from kvpolicy.plan.plan import compile_policy
from kvpolicy.stages import Geometry, QueryLogits
from tests.support.compressing import chosen, compress_layers
from tests.support.driving import feed, new_layer, plan_of, random_entries
from tests.support.policies import small
from tests.support.storage import padded
from tests.support.views import view_of

HEADS, GROUP, DIM, SLOTS = 2, 2, 8, 24
WRONG = (torch.nan, torch.inf, -torch.inf)


def seen(place=None, wrong=torch.nan, name="keys", window=4):
    """Two rows; row 1 has a number that is not finite in head 0."""
    random = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, HEADS, SLOTS, DIM, generator=random) for _ in range(2))
    queries = torch.randn(2, HEADS * GROUP, window, DIM, generator=random)
    view = view_of(keys, values=values, queries=queries, recent=2)
    if place is not None:
        getattr(view, name)[1, 0, place, 3] = wrong
    return view


@pytest.mark.parametrize(
    ("name", "place", "kernels"),
    [
        *((name, place, False) for name in ("snapkv", "rkv", "adakv") for place in (0, 5, 21)),
        ("snapkv", 5, True),
        ("adakv", 0, True),
    ],
)
def test_a_key_that_is_not_finite_goes_first(name, place, kernels):
    spec = small(name, protect={"sinks": 0, "recent": 2}).spec
    plan = compile_policy(spec, Geometry((0,), HEADS * GROUP, HEADS, DIM), "cpu", torch.float32, kernels=kernels)
    assert bool(plan.fusion.off) != kernels
    usual = compress_layers(plan, [seen(window=32)], [[9, 9]])[0]
    with pytest.warns(NonFiniteScoreWarning, match="rank last"):
        found = compress_layers(plan, [seen(place, window=32)], [[9, 9]])[0]
    assert place not in found.kept[1, 0]
    rows = [[head[head >= 0].tolist() for head in row] for row in (usual.kept[0], found.kept[0])]
    assert rows[0] == rows[1]


def test_a_faulty_entry_is_kept_where_there_is_room_for_all():
    spec = small("snapkv", protect={"sinks": 0, "recent": 2}).spec
    with pytest.warns(NonFiniteScoreWarning):
        assert 5 in chosen(spec, seen(5), [SLOTS, SLOTS]).kept[1, 0]


@pytest.mark.parametrize("update", ["max", "mean", "sum"])
def test_scores_that_were_nan_are_not_remembered(update):
    """The round with the NaN says so; the next one ranks as if it had been the first."""
    of = {"use": "attention", "queries": 4}
    spec = small("gkv", score=[{"use": "history", "of": of, "update": update}]).spec
    name = state_name(0, "history")

    def after(view, state):
        return chosen(spec, attrs.evolve(view, slot_state={name: state}), [9, 9])

    none_yet = torch.full((2, HEADS, SLOTS), -torch.inf)
    with pytest.warns(NonFiniteScoreWarning):
        faulty = after(seen(2, name="queries"), none_yet)
    state = faulty.observed[name]
    assert not state.isnan().any()
    again, first = after(seen(), state), after(seen(), none_yet)
    assert torch.equal(again.kept[1, 0], first.kept[1, 0])
    assert torch.equal(again.observed[name][1, 0], first.observed[name][1, 0])


def query_logits(place=None, wrong=torch.nan, query=None):
    """What three queries see, in row 1 a logit that says nothing: of one entry, or of all for one query."""
    logits = torch.randn(2, HEADS, GROUP, 3, SLOTS, generator=torch.Generator().manual_seed(1))
    logits[..., 0, -2:] = logits[..., 1, -1:] = -torch.inf
    if place is not None:
        logits[1, 0, :, 1:, place] = wrong
    if query is not None:
        logits[1, 0, :, query] = wrong
    return QueryLogits(logits)


def follower(name, **merge):
    policy = kvpolicy.load(name) if not merge else small("snapkv", merge=merge)
    return forward_observers_of(policy.spec)[-1]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_the_attention_mass_of_a_query_that_is_not_finite_counts_for_nothing(wrong):
    one = follower("h2o")
    start = {ATTENTION: torch.rand(2, HEADS, SLOTS, GROUP, generator=torch.Generator().manual_seed(2))}
    clean, found = (
        one.update(given, start)[ATTENTION] for given in (query_logits(), query_logits(query=2, wrong=wrong))
    )
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[1, 1], clean[1, 1])
    others = query_logits().probabilities[1, 0, :, :2].sum(1).transpose(0, 1)
    torch.testing.assert_close(found[1, 0], start[ATTENTION][1, 0] + others)
    seldom = one.update(query_logits(place=20, wrong=wrong), start)[ATTENTION]
    only = query_logits().probabilities[1, 0, :, 0].transpose(0, 1)
    others = torch.arange(SLOTS) != 20
    torch.testing.assert_close(seldom[1, 0, others], (start[ATTENTION][1, 0] + only)[others])
    assert seldom[1, 0, 20].isnan().all() == (wrong != torch.inf)  # an entry that alone is NaN is told from the others


@pytest.mark.parametrize("wrong", ["keys", "queries"])
def test_kernels_note_the_same_mass_and_give_the_same_output(wrong):
    found = []
    for kernels in (False, True):
        layer = new_layer(plan_of(small("h2o", 20), kernels=kernels))
        generator = torch.Generator().manual_seed(0)
        for step, count in enumerate((24, 1, 1)):
            keys, values, queries = random_entries(generator, 2, count)
            if step == (0 if wrong == "keys" else 1):
                {"keys": keys, "queries": queries}[wrong][1, 0, min(count - 1, 22)] = torch.nan
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NonFiniteScoreWarning)
                output = feed(layer, keys, values, queries)
        found.append((output, padded(layer.storage, ATTENTION), padded(layer.storage, "positions")))
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, equal_nan=True)
    mass = found[0][1]
    assert not mass[0].isnan().any()
    assert mass[1].isnan().any() == (wrong == "keys")
    assert mass[1, 0].isnan().any(-1).sum() <= 1
    assert not mass[1, 1].isnan().any()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("estimate", ["ema", "window"])
def test_an_estimate_that_was_not_told_anything_stays(estimate, wrong):
    """A logit that is not finite is as one that was never seen; all other estimates are those of a plain forward."""
    one = follower("keepkv", use="keepkv", window=3, estimate=estimate)
    fills = {name: 0.0 if name == "samples" else -torch.inf for name in one.columns}
    start = {name: torch.full((2, HEADS, SLOTS), fill) for name, fill in fills.items()}
    clean, found = one.update(query_logits(), start), one.update(query_logits(place=5, wrong=wrong), start)
    hidden = one.update(query_logits(place=5, wrong=-torch.inf), start)
    for name, state in found.items():
        assert not state.isnan().any()
        assert (state < torch.inf).all()
        others = torch.arange(SLOTS) != 5
        assert torch.equal(state[..., others], clean[name][..., others])
        assert torch.equal(state, hidden[name])
