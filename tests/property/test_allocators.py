"""Budgets are spent exactly, whatever the layers and heads look like (P5)."""

import attrs
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kvpolicy.stages import Geometry
from kvpolicy_plugins.allocators.adaptive import Adaptive
from kvpolicy_plugins.allocators.global_ranking import GlobalRanking
from kvpolicy_plugins.allocators.headkv import HeadKV
from kvpolicy_plugins.allocators.pyramid import Pyramid
from kvpolicy_plugins.allocators.shared.apportion import apportion, water_fill
from kvpolicy_plugins.allocators.threshold import Threshold
from kvpolicy_plugins.allocators.uniform_heads import UniformHeads
from kvpolicy_plugins.allocators.uniform_layers import UniformLayers
from tests.property.layers import scored
from tests.support.allocating import counts_of, joint_counts, shares_of
from tests.support.views import view_of

betas = st.one_of(st.sampled_from((1, 5, 20)), st.floats(1e-3, 1e6))
layer_allocators = st.one_of(st.just(UniformLayers()), st.builds(Pyramid, betas))
head_allocators = st.one_of(
    st.just(UniformHeads()),
    st.builds(Adaptive, st.one_of(st.sampled_from((0, 0.2, 1)), st.floats(0, 1)), st.sampled_from(("none", "mass"))),
)
finite = scored().filter(lambda drawn: drawn[0].isfinite().all())


@attrs.frozen
class Request:
    """What one sequence asks of a layer allocator."""

    layers: int
    budget: int  # entries per KV head and layer, the protected ones included
    protected: int
    length: int

    def shares(self, allocator):
        return shares_of(allocator, self.layers, self.budget, self.protected, self.length)


@st.composite
def requests(draw):
    protected = draw(st.integers(0, 64))
    budget = protected + draw(st.integers(0, 5000))
    length = protected + draw(st.one_of(st.integers(0, 100_000), st.integers(0, 5000)))
    return Request(draw(st.integers(1, 96)), budget, protected, length)


@given(st.data(), st.integers(1, 12))
def test_weighted_shares_are_one_level_for_all_that_are_not_full(data, count):
    rooms = torch.tensor(data.draw(st.lists(st.integers(0, 500), min_size=count, max_size=count)))
    weights = torch.tensor(data.draw(st.lists(st.floats(1e-6, 1e3), min_size=count, max_size=count)))
    total = (rooms.sum() * data.draw(st.floats(0, 1))).long()
    shares = water_fill(rooms, total, weights)
    assert shares.sum().item() == pytest.approx(total.item(), abs=1e-6)
    assert ((shares >= 0) & (shares <= rooms)).all()
    levels = (shares / weights.double())[shares < rooms.double() * (1 - 1e-9)]
    if len(levels):
        assert levels.max().item() == pytest.approx(levels.min().item(), rel=1e-6)
        assert (rooms / weights.double() <= levels.max() * (1 + 1e-6))[shares == rooms].all()


@given(requests(), layer_allocators)
def test_layers_spend_the_budget_on_what_they_hold(request, allocator):
    found = request.shares(allocator)
    assert len(found) == request.layers
    assert sum(found) == request.layers * min(request.budget, request.length)
    assert request.protected <= min(found)
    assert max(found) <= request.length


@given(requests(), st.floats(1, 1e6))
def test_a_pyramid_never_widens_upwards(request, beta):
    found = request.shares(Pyramid(beta))
    assert list(found) == sorted(found, reverse=True)


@given(requests())
def test_a_pyramid_of_beta_one_is_uniform(request):
    assert request.shares(Pyramid(1)) == request.shares(UniformLayers())


@given(requests())
def test_a_longer_sequence_does_not_change_a_pyramid_that_fits(request):
    assume(request.length >= 2 * request.budget - request.protected)
    longer = attrs.evolve(request, length=2 * request.length)
    assert longer.shares(Pyramid()) == request.shares(Pyramid())


@given(requests(), betas)
def test_the_published_rounding_only_overshoots_by_the_floored_steps(request, beta):
    assume(beta >= 1)
    found = sum(request.shares(Pyramid(beta, "floor_step")))
    exact = request.layers * min(request.budget, request.length)
    assert 0 <= found - exact <= request.layers * (request.layers - 1) / 2


@given(scored(), head_allocators, st.integers(0, 400))
def test_heads_spend_the_budget_on_what_they_hold(drawn, allocator, budget):
    scores, candidates = drawn
    counts = counts_of(allocator, scores, candidates, torch.full(scores.shape[:1], budget))
    room = candidates.sum(-1)
    assert counts.dtype == torch.int64
    assert torch.equal(counts.sum(-1), room.sum(-1).clamp(max=budget))
    assert ((counts >= 0) & (counts <= room)).all()


@given(scored(), head_allocators, st.integers(0, 400))
def test_rows_are_allocated_apart(drawn, allocator, budget):
    scores, candidates = drawn
    budgets = torch.full(scores.shape[:1], budget)
    together = counts_of(allocator, scores, candidates, budgets)
    for row in range(len(budgets)):
        part = slice(row, row + 1)
        assert torch.equal(counts_of(allocator, scores[part], candidates[part], budgets[part]), together[part])


@given(scored(), st.integers(0, 400), st.one_of(st.sampled_from((-1e9, 0.0, 1e9)), st.floats(-3, 3, width=32)))
def test_a_threshold_keeps_the_best_of_the_budget_that_reach_it(drawn, budget, value):
    scores, candidates = drawn
    budgets = torch.full(scores.shape[:1], budget)
    found = counts_of(Threshold(value), scores, candidates, budgets)
    best = joint_counts(GlobalRanking(), [scores], [candidates], budgets)[0]
    for row, head in torch.cartesian_prod(*map(torch.arange, found.shape)).reshape(-1, 2).tolist():
        inside = candidates[row, head]
        reached = sum(score >= value for score in scores[row, head][inside].tolist())
        fits = int(candidates[row].sum()) <= budget
        assert found[row, head] == (inside.sum() if fits else min(int(best[row, head]), reached))


@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.integers(-900, 900), st.sampled_from(("mean", "max")))
def test_only_ratios_of_published_importances_count(data, layers, group, scale, reduced):
    heads = st.lists(
        st.floats(0, 1e3).filter(lambda number: number == 0 or number > 1e-3), min_size=2 * group, max_size=2 * group
    )
    table = torch.tensor(data.draw(st.lists(heads, min_size=layers, max_size=layers)), dtype=torch.float64)
    geometry, allocator = Geometry(tuple(range(layers)), 2 * group, 2, 8), HeadKV(group=reduced)

    def shown(numbers):
        found = allocator.calibration_of(numbers, geometry)
        return torch.stack([allocator.statistics(view_of(torch.zeros(1, 2, 1, 8), calibration=own)) for own in found])

    assert torch.equal(shown(table * 2.0**scale), shown(table))
    reduce = max if reduced == "max" else (lambda numbers: sum(numbers) / group)
    loop = [[reduce(row[head : head + group]) for head in (0, group)] for row in table.tolist()]
    largest = table.max().item() or 1
    assert torch.allclose(shown(table)[:, 0].double() * largest, torch.tensor(loop, dtype=torch.float64), rtol=1e-6)


@given(scored(), st.integers(0, 400))
def test_uniform_heads_differ_by_one_unless_a_head_is_full(drawn, budget):
    scores, candidates = drawn
    counts = counts_of(UniformHeads(), scores, candidates, torch.full(scores.shape[:1], budget))
    room = candidates.sum(-1)
    largest = counts.amax(-1, keepdim=True)
    assert ((counts >= largest - 1) | (counts == room)).all()


@given(finite, st.integers(0, 400))
def test_a_floor_of_one_is_uniform(drawn, budget):
    scores, candidates = drawn
    budgets = torch.full(scores.shape[:1], budget)
    assert torch.equal(
        counts_of(Adaptive(1), scores, candidates, budgets),
        counts_of(UniformHeads(), scores, candidates, budgets),
    )


@given(finite, st.integers(0, 400), st.sampled_from((0.25, 4.0)))
def test_one_scale_for_all_heads_changes_no_budget(drawn, budget, scale):
    scores, candidates = drawn
    assume((scores == 0).logical_or(scores.abs() > 1e-30).all() and scores.abs().max() < 1e30)
    budgets = torch.full(scores.shape[:1], budget)
    allocator = Adaptive(0.2)
    assert torch.equal(
        counts_of(allocator, scale * scores, candidates, budgets),
        counts_of(allocator, scores, candidates, budgets),
    )


@given(finite, st.integers(0, 400))
def test_without_a_floor_no_head_budget_holds_more_score(drawn, budget):
    """Ada-KV, theorem 1: the best of the whole layer is what the heads keep together."""
    scores, candidates = drawn
    assume(scores.abs().max() < 1e30)
    budgets = torch.full(scores.shape[:1], budget)
    kept = [
        kept_mass(scores, candidates, counts_of(allocator, scores, candidates, budgets))
        for allocator in (Adaptive(0), UniformHeads())
    ]
    assert (kept[0] >= kept[1] - 1e-9).all()


def kept_mass(scores, candidates, counts):
    ordered = scores.double().masked_fill(~candidates, -1e300).sort(-1, descending=True).values
    return ordered.where(torch.arange(ordered.shape[-1]) < counts[..., None], 0.0).sum((1, 2))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(0, 500))
def test_even_shares_fill_the_small_and_level_the_others(room, total):
    rooms = torch.tensor(room)
    spent = torch.tensor(min(total, sum(room)))
    shares = water_fill(rooms, spent)
    assert float(shares.sum()) == pytest.approx(float(spent))
    level = shares.max()
    assert torch.allclose(shares, rooms.double().clamp(max=float(level)))
    whole = apportion(shares, spent)
    assert whole.sum() == spent
    assert ((whole - shares).abs() < 1).all()


@given(scored(), st.floats(0, 1), st.integers(0, 800), st.integers(0, 2**20))
def test_layers_that_compete_spend_the_budget_on_what_they_hold(drawn, floor, budget, seed):
    scores, candidates = drawn
    other = scores[..., torch.randperm(scores.shape[-1], generator=torch.Generator().manual_seed(seed))]
    counts = joint_counts(
        GlobalRanking(floor), [scores, other], [candidates, candidates], torch.full(scores.shape[:1], budget)
    )
    room = torch.stack([candidates.sum(-1)] * 2)
    assert counts.dtype == torch.int64
    assert torch.equal(counts.sum((0, 2)), room.sum((0, 2)).clamp(max=budget))
    assert ((counts >= 0) & (counts <= room)).all()


@given(finite, st.integers(0, 400), st.integers(0, 2**20))
def test_without_a_floor_no_budget_of_layers_and_heads_holds_more_score(drawn, budget, seed):
    """The best of all layers is what they keep together."""
    scores, candidates = drawn
    assume(scores.abs().max() < 1e30)
    other = scores[..., torch.randperm(scores.shape[-1], generator=torch.Generator().manual_seed(seed))] * 0.5 - 0.25
    layers, budgets = [(scores, candidates), (other, candidates)], torch.full(scores.shape[:1], budget)
    apart = [counts_of(Adaptive(0), *layer, budgets) for layer in layers]
    spent = sum(counts.sum(-1) for counts in apart)
    jointly = joint_counts(GlobalRanking(), *zip(*layers, strict=True), spent)
    mass = [
        sum(kept_mass(*layer, counts) for layer, counts in zip(layers, each, strict=True)) for each in (jointly, apart)
    ]
    assert (mass[0] >= mass[1] - 1e-9).all()
