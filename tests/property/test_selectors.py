"""The best of each head, whatever the scores are (P1, P2, P4, P8, P9); and what all selectors promise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy.stages.slots import indices_of
from kvpolicy_plugins.selectors.chunks import Chunks
from kvpolicy_plugins.selectors.fair import Fair
from kvpolicy_plugins.selectors.sample import Sample
from kvpolicy_plugins.selectors.topk import TopK
from kvpolicy_plugins.selectors.whitelist import Whitelist
from tests.property.layers import scored
from tests.support.selecting import selected_by


@st.composite
def selections(draw):
    """Scores, candidates, and counts that the candidates can fill."""
    scores, candidates = draw(scored())
    room = candidates.sum(-1)
    share = draw(st.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0)))
    return scores, candidates, (room * share).long()


@st.composite
def regions_and_ranges(draw):
    """A selection, numbers of regions, and second scores."""
    scores, candidates, counts = draw(selections())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    regions = torch.randint(0, draw(st.integers(1, 4)), scores.shape, generator=generator, dtype=torch.int8)
    return (scores, candidates, counts), {"regions": regions, "second_scores": scores.roll(1, -1)}


def worth(score):
    """What Python sorts by: NaN below everything, -0.0 like 0.0."""
    return (0, 0.0) if score != score else (1, score + 0.0)  # noqa: PLR0124


@given(selections())
def test_topk_is_a_stable_sort(drawn):
    scores, candidates, counts = drawn
    chosen = selected_by(TopK(), *drawn)
    for row, head in torch.cartesian_prod(*map(torch.arange, scores.shape[:2])).reshape(-1, 2).tolist():
        slots = candidates[row, head].nonzero().flatten().tolist()
        ranked = sorted(slots, key=lambda slot: worth(scores[row, head, slot].item()), reverse=False)
        ranked = sorted(ranked, key=lambda slot: worth(scores[row, head, slot].item()), reverse=True)
        expected = sorted(ranked[: counts[row, head]])
        assert chosen[row, head].nonzero().flatten().tolist() == expected


@given(selections())
def test_chosen_are_candidates_as_many_as_asked(drawn):
    _, candidates, counts = drawn
    chosen = selected_by(TopK(), *drawn)
    assert torch.equal(chosen.sum(-1), counts)
    assert not (chosen & ~candidates).any()
    kept = indices_of(chosen)
    ascending = kept.diff(dim=-1) > 0
    assert (ascending | (kept[..., 1:] == -1)).all()


@given(selections())
def test_choosing_again_changes_nothing(drawn):
    scores, _, counts = drawn
    chosen = selected_by(TopK(), *drawn)
    assert torch.equal(selected_by(TopK(), scores, chosen, counts), chosen)


@given(selections())
def test_a_larger_count_keeps_what_a_smaller_one_kept(drawn):
    scores, candidates, counts = drawn
    fewer = selected_by(TopK(), scores, candidates, counts // 2)
    assert not (fewer & ~selected_by(TopK(), *drawn)).any()


@given(selections())
def test_rows_and_heads_are_chosen_apart(drawn):
    together = selected_by(TopK(), *drawn)
    turned = selected_by(TopK(), *(part.flip((0, 1)) for part in drawn))
    assert torch.equal(turned, together.flip((0, 1)))
    alone = selected_by(TopK(), *(part[:1, :1] for part in drawn))
    assert torch.equal(alone, together[:1, :1])


ALL = [TopK(), Chunks(3), Chunks(4, "sum"), Fair(), Fair("cumulative"), Sample(), Sample(0), Sample(1), Whitelist()]


@pytest.mark.parametrize("selector", ALL, ids=repr)
@given(regions_and_ranges())
def test_every_selector_chooses_as_many_candidates_as_asked(selector, drawn):
    selection, rest = drawn
    chosen = selected_by(selector, *selection, **rest)
    assert torch.equal(chosen.sum(-1), selection[2])
    assert not (chosen & ~selection[1]).any()


@pytest.mark.parametrize("selector", ALL, ids=repr)
@given(regions_and_ranges())
def test_rows_are_chosen_apart_by_every_selector(selector, drawn):
    selection, rest = drawn
    together = selected_by(selector, *selection, **rest)
    last = {name: tensor[-1:] for name, tensor in rest.items()}
    assert torch.equal(selected_by(selector, *(part[-1:] for part in selection), **last), together[-1:])


@pytest.mark.parametrize("selector", ALL, ids=repr)
@given(regions_and_ranges())
def test_a_number_goes_only_when_no_nan_is_kept(selector, drawn):
    (scores, candidates, counts), rest = drawn
    chosen = selected_by(selector, scores, candidates, counts, **rest)
    nan = (chosen & scores.isnan()).any(-1)
    assert not (nan & (candidates & ~chosen & ~scores.isnan()).any(-1)).any()


@pytest.mark.parametrize("rounding", ["largest_remainder", "cumulative"])
@given(regions_and_ranges())
def test_no_region_is_one_entry_away_from_its_share(rounding, drawn):
    (scores, candidates, counts), rest = drawn
    chosen = selected_by(Fair(rounding), scores, candidates, counts, **rest)
    sound = candidates & ~scores.isnan()
    for region in range(4):
        inside = sound & (rest["regions"] == region)
        share = inside.sum(-1) * counts.minimum(sound.sum(-1)) / sound.sum(-1).clamp(min=1)
        assert ((chosen & inside).sum(-1) - share).abs().max() < 1
