"""Scores are weighted, normalised and summed; budgets become counts per head."""

import copy
from functools import partial

import attrs
import pytest
import torch

from kvpolicy.errors import NonFiniteScoreWarning, PluginContractError
from kvpolicy.plan.compress.fusion import fusion_of
from kvpolicy.plan.compress.step import compress
from kvpolicy.plan.forward_observers import state_name
from kvpolicy.spec.policy import Weighted
from kvpolicy.stages import Entries, Scorer, Selector, State
from kvpolicy.stages.conformance.samples import shuffled
from kvpolicy.stages.ordering import highest
from kvpolicy_plugins.allocators.uniform_heads import UniformHeads
from kvpolicy_plugins.scorers.attention_free.key_norm import KeyNorm
from kvpolicy_plugins.selectors.topk import TopK
from tests.support.compressing import allocated, compress_one, score
from tests.support.policies import small
from tests.support.views import view_of

SCORES = torch.tensor([[[4.0, -2.0, 8.0, 1.0, 3.0]]])


@attrs.frozen
class Given(Scorer):
    """The first component of the key, plus a constant."""

    name = "given"
    plus: float = 0.0

    def score(self, view):
        return view.keys[..., 0] + self.plus


@attrs.frozen
class Counting(Scorer):
    """How many compressions an entry has lived through."""

    name = "counting"

    def slot_state(self):
        return (State("age"),)

    def observe(self, view):
        return {"age": view.slot_state["age"] + 1}

    def score(self, view):
        return view.slot_state["age"]


def spec_of(*terms):
    return attrs.evolve(small("snapkv").spec, score=terms)


def view(scores=SCORES, **rest):
    return view_of(torch.stack([scores, torch.zeros_like(scores)], -1), **rest)


def scored(spec, **rest):
    return score(spec, view(**rest))[0]


def test_terms_are_weighted_and_summed():
    terms = Weighted(Given(), weight=2.0), Weighted(Given(plus=1.0), weight=-0.5)
    assert torch.allclose(scored(spec_of(*terms)), 2 * SCORES - 0.5 * (SCORES + 1))


def test_a_maximum_of_one():
    assert torch.allclose(scored(spec_of(Weighted(Given(), normalise="max"))), SCORES / 8)


def test_a_mean_of_zero_and_a_deviation_of_one():
    found = scored(spec_of(Weighted(Given(), normalise="standard")))
    assert found.mean().item() == pytest.approx(0, abs=1e-6)
    assert found.std(correction=0).item() == pytest.approx(1)


@pytest.mark.parametrize("normalise", ["max", "standard"])
@pytest.mark.parametrize("value", [0.0, 5.0])
def test_equal_scores_can_be_normalised(normalise, value):
    spec = spec_of(Weighted(Given(), normalise=normalise))
    assert score(spec, view(torch.full((1, 1, 4), value)))[0].isfinite().all()


@pytest.mark.parametrize("normalise", ["max", "standard"])
def test_only_candidates_count_when_normalising(normalise):
    spec = spec_of(Weighted(Given(), normalise=normalise))
    found = scored(spec, sinks=1, recent=1)[..., 1:4]
    assert torch.allclose(found, score(spec, view(SCORES[..., 1:4]))[0])


def test_what_is_no_candidate_scores_least():
    found = scored(spec_of(Weighted(Given())), sinks=1, lengths=torch.tensor([[4]]))
    assert found.tolist() == [[[-torch.inf, -2.0, 8.0, 1.0, -torch.inf]]]


def test_nan_ranks_last_and_is_said():
    scores = torch.tensor([[[1.0, torch.nan, 3.0]]])
    with pytest.warns(NonFiniteScoreWarning, match="1 of 3 scores are NaN"):
        assert compress_one(spec_of(Weighted(Given())), view(scores), [2]).kept.tolist() == [[[0, 2]]]
    found, _ = score(spec_of(Weighted(Given())), view(scores))
    assert found.tolist() == [[[1.0, -torch.inf, 3.0]]]


def test_nan_outside_the_candidates_is_nobodys_business():
    scores = torch.tensor([[[torch.nan, 1.0, 3.0]]])
    assert scored(spec_of(Weighted(Given())), sinks=1).isfinite().any()
    assert score(spec_of(Weighted(Given())), view(scores, sinks=1))[0].tolist() == [[[-torch.inf, 1.0, 3.0]]]


def test_the_state_of_a_scorer_is_updated_seen_and_moved():
    spec = spec_of(Weighted(Given()), Weighted(Counting()))
    name = state_name(1, "age")
    old = {name: torch.tensor([[[0.0, 10.0, 20.0, 30.0, 40.0]]])}
    done = compress_one(spec, view(slot_state=old), [2])
    assert done.kept.tolist() == [[[3, 4]]]
    assert done.observed[name].tolist() == [[[1.0, 11.0, 21.0, 31.0, 41.0]]]


@attrs.frozen
class Shown(TopK):
    """Notes what it is given."""

    given: list = attrs.field(factory=list)

    def select(self, request):
        self.given.append((request.scores, request.candidates))
        return super().select(request)


@attrs.frozen
class ShownHeads(UniformHeads):
    """The same for an allocator."""

    given: list = attrs.field(factory=list)
    reads_scores = True

    def allocate(self, request):
        self.given.append((*request.scores, *request.candidates))
        return super().allocate(request)


def test_allocators_and_selectors_see_scores_in_the_order_of_positions():
    spec = spec_of(Weighted(Given()))
    selector, allocator = Shown(), ShownHeads()
    spec = attrs.evolve(spec, select=selector, allocate=attrs.evolve(spec.allocate, heads=allocator))
    straight = view(sinks=1, recent=1)
    other, _ = shuffled(straight)
    assert not torch.equal(other.positions, straight.positions)
    for one in (straight, other):
        compress_one(spec, one, [3])
    for shown in (selector.given, allocator.given):
        for first, second in zip(*shown, strict=True):
            assert torch.equal(first, second)


@attrs.frozen
class LargeValues(Selector):
    """The candidates with the largest values, whatever their scores; told one number of each entry, or its channels."""

    name = "large_values"
    channels: bool = False

    def second_scores(self, view):
        return view.values.float().mT if self.channels else view.values.float().norm(dim=-1)

    def select(self, request):
        told = request.second_scores
        sizes = told.norm(dim=2) if self.channels else told
        return highest(sizes, request.candidates, request.counts)


@pytest.mark.parametrize("channels", [False, True])
def test_what_selectors_know_of_entries_stands_in_ascending_order(channels):
    spec = attrs.evolve(small("snapkv").spec, score=(Weighted(KeyNorm()),), select=LargeValues(channels))
    straight = view_of(torch.randn(2, 2, 12, 8, generator=torch.Generator().manual_seed(1)), sinks=1, recent=2)
    other, _ = shuffled(straight)
    expected, found = (compress_one(spec, one, [6, 6]).kept for one in (straight, other))
    assert torch.equal(other.positions.gather(-1, found).sort().values, straight.positions.gather(-1, expected))


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("kernels", [False, True], ids=["references", "kernels"])
def test_selectors_know_of_entries_that_are_gone_when_they_select(kernels, channels):
    """Keys and values of a group of layers are let go of before the next one is scored."""
    generator = torch.Generator().manual_seed(1)
    spec = attrs.evolve(small("snapkv").spec, score=(Weighted(KeyNorm()),), select=LargeValues(channels))
    views = [view_of(torch.randn(1, 2, 12, 8, generator=generator), sinks=1, recent=2) for _ in range(2)]
    budgets, tokens = torch.full((2, 1), 6), torch.tensor([12])
    fusion = fusion_of(spec, "") if kernels else None
    found = compress(spec, fusion, [[partial(copy.copy, view)] for view in views], budgets, tokens)
    for view, (result,) in zip(views, found, strict=True):
        norms = view.values.norm(dim=-1)
        for head, kept in enumerate(result.kept[0].tolist()):
            largest = sorted(range(1, 10), key=lambda slot, own=norms[0, head]: -own[slot].item())[:3]
            assert kept == sorted([0, *largest, 10, 11])


def test_two_scorers_of_a_kind_have_states_of_their_own():
    spec = spec_of(Weighted(Counting()), Weighted(Counting(), weight=-2.0))
    old = {state_name(term, "age"): torch.full((1, 1, 5), float(term)) for term in range(2)}
    total, state = score(spec, view(slot_state=old))
    assert (total == 1.0 - 2 * 2.0).all()
    assert [state[state_name(term, "age")][0, 0, 0].item() for term in range(2)] == [1.0, 2.0]


@pytest.mark.parametrize(("budget", "free"), [(5, 5), (4, 4), (2, 2), (1, 1)])
def test_a_budget_counts_what_is_protected(budget, free):
    shown = view(sinks=1, recent=0)
    counts = allocated(spec_of(Weighted(Given())), shown, SCORES, [budget])
    assert counts.tolist() == [[min(free - 1, 4)]]


def test_a_row_within_its_budget_keeps_everything():
    assert compress_one(spec_of(Weighted(Given())), view(), [9]).kept.tolist() == [[[0, 1, 2, 3, 4]]]


def replaced(stage, **functions):
    """A policy one plugin of which answers wrongly."""
    spec = small("snapkv").spec
    holder, name = {"score": (spec.score[0], "scorer"), "heads": (spec.allocate, "heads")}.get(stage, (spec, stage))
    plugin = getattr(holder, name)
    kind = attrs.frozen(type("Wrong", (type(plugin),), functions))
    wrong = kind(**attrs.asdict(plugin, recurse=False))
    if stage == "score":
        return attrs.evolve(spec, score=(attrs.evolve(holder, scorer=wrong),))
    return (
        attrs.evolve(spec, allocate=attrs.evolve(holder, heads=wrong))
        if stage == "heads"
        else attrs.evolve(spec, **{stage: wrong})
    )


@pytest.mark.parametrize(
    ("stage", "functions", "message"),
    [
        ("score", {"score": lambda _, view: view.keys[..., :1, 0].float()}, "returned shape"),
        ("score", {"score": lambda _, view: view.keys[..., 0].double()}, "returned torch.float64"),
        ("score", {"score": lambda _, view: None}, "returned NoneType"),
        ("heads", {"allocate": lambda _, request: request.total}, "returned shape"),
        ("heads", {"allocate": lambda _, request: request.room.float()}, "torch.float32"),
        ("select", {"second_scores": lambda _, view: view.keys[..., 0].double()}, "returned torch.float64"),
        ("select", {"second_scores": lambda _, view: view.values}, r"returned shape .* expected .*n=30, seq=30"),
        ("select", {"second_scores": lambda _, view: view.values[..., None]}, "returned shape"),
        ("select", {"select": lambda _, request: request.candidates.long()}, "torch.int64"),
        ("select", {"select": lambda _, request: request.candidates[:, :1]}, "returned shape"),
        (
            "merge",
            {"merge": lambda _, view, kept: Entries(view.keys, view.values), "moves_only": False},
            "returned shape",
        ),
    ],
)
def test_a_plugin_that_answers_wrongly_is_named(stage, functions, message):
    view = view_of(torch.randn(1, 2, 30, 8), queries=torch.randn(1, 4, 8, 8))

    with pytest.raises(PluginContractError, match=message):
        compress_one(replaced(stage, **functions), view, [12])
