"""Two stages: how they depend on scores and projected values, in blocks or at once."""

import pytest
import torch
from torch.testing import assert_close

from kvpolicy.stages import SelectionRequest, projected_values
from kvpolicy_plugins.selectors.critical import Critical
from kvpolicy_plugins.selectors.topk import TopK
from tests.support.views import view_of

ROWS, HEADS, GROUP, SLOTS, DIM, CHANNELS = 2, 3, 2, 40, 6, 7


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shown(**changes):
    given = {
        "queries": normal(ROWS, HEADS * GROUP, 1, DIM),
        "values": normal(ROWS, HEADS, SLOTS, DIM, seed=1),
        "output_projection": normal(HEADS * GROUP, DIM, CHANNELS, seed=2),
    }
    return view_of(normal(ROWS, HEADS, SLOTS, DIM, seed=3), recent=4, **{**given, **changes})


def chosen(selector, view, scores, count):
    counts = torch.full(view.positions.shape[:2], count)
    return selector.select(SelectionRequest.of(view, scores, counts, selector.second_scores(view)))


SCORES = normal(ROWS, HEADS, SLOTS, seed=4).abs()


def test_norms_are_of_the_part_of_the_projection_that_a_query_head_has():
    view = shown()
    norms = Critical().second_scores(view)
    for row, head, slot in ((0, 0, 0), (1, 2, 39), (0, 1, 17)):
        added = [view.values[row, head, slot] @ view.projection[head * GROUP + member] for member in range(GROUP)]
        assert_close(norms[row, head, slot], torch.stack([one.abs().sum() for one in added]).mean())


@pytest.mark.parametrize("most", [1, 500, 2**24])
def test_blocks_give_what_one_product_gives(monkeypatch, most):
    """And no more numbers exist at one time than are allowed, or one slot has."""
    expected = Critical().second_scores(shown())
    sizes, einsum = [], torch.einsum

    def counted(*given):
        sizes.append((found := einsum(*given)).numel())
        return found

    monkeypatch.setattr(torch, "einsum", counted)
    monkeypatch.setattr(projected_values, "_PRODUCTS", most)
    assert_close(Critical().second_scores(shown()), expected)
    assert max(sizes) <= max(most, ROWS * HEADS * GROUP * CHANNELS)
    assert sum(sizes) == ROWS * HEADS * GROUP * CHANNELS * SLOTS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_products_are_in_float32_whatever_the_model_is_in(dtype):
    view = shown()
    other = shown(values=view.values.to(dtype), output_projection=view.output_projection.to(dtype))
    norms = Critical().second_scores(other)
    assert norms.dtype == torch.float32
    rounded = shown(values=other.values.float(), output_projection=other.output_projection.float())
    assert torch.equal(norms, Critical().second_scores(rounded))


@pytest.mark.parametrize("count", [0, 1, 5, 20, 36])
def test_the_ends_are_the_scores_alone_and_the_norms_alone(count):
    view = shown()
    assert torch.equal(chosen(Critical(1.0), view, SCORES, count), chosen(TopK(), view, SCORES, count))
    norms = Critical().second_scores(view)
    assert torch.equal(chosen(Critical(0.0, 1e6), view, 1e-9 * SCORES, count), chosen(TopK(), view, norms, count))


def test_equal_norms_change_nothing():
    view = shown(values=torch.ones(ROWS, HEADS, SLOTS, DIM))
    assert torch.equal(chosen(Critical(0.3), view, SCORES, 13), chosen(TopK(), view, SCORES, 13))


def test_scales_of_values_and_weights_do_not_count():
    view = shown()
    other = shown(values=8 * view.values, output_projection=view.output_projection / 2)
    assert torch.equal(chosen(Critical(), other, SCORES, 13), chosen(Critical(), view, SCORES, 13))


def test_the_first_stage_stays_whatever_its_values_are():
    """Five of ten by score: their values are zero."""
    best = SCORES[..., :-4].topk(5).indices
    values = shown().values.scatter(2, best[..., None].expand(-1, -1, -1, DIM), 0.0)
    stays = chosen(Critical(0.5), shown(values=values), SCORES, 10)
    assert stays.gather(-1, best).all()
    assert not chosen(Critical(0.0), shown(values=values), SCORES, 10).gather(-1, best).any()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_values_that_are_not_finite_come_after_all_others_with_a_score(wrong):
    view = shown()
    values, scores = view.values.clone(), SCORES.clone()
    values[0, 0, 3], values[0, 0, 4] = torch.nan, wrong
    scores[0, 0, 3] = scores[0, 0, 5] = torch.nan
    view = shown(values=values)
    for count, evicted in ((33, {3, 4, 5}), (34, {3, 5}), (35, {5})):
        stays = chosen(Critical(0.0), view, scores, count)[0, 0, :36]
        left = set((~stays).nonzero().flatten().tolist())
        assert left == evicted
    assert_close(Critical().second_scores(view)[1], Critical().second_scores(shown())[1])


def test_a_view_without_the_projection_says_what_to_declare():
    with pytest.raises(ValueError, match="declare it in the plugin's `needs`"):
        Critical().second_scores(shown(output_projection=None))
    counts = torch.full((ROWS, HEADS), 3)
    with pytest.raises(ValueError, match="give it what its second_scores returned"):
        Critical().select(SelectionRequest.of(shown(), SCORES, counts))
