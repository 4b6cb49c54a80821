"""Blocks and their representatives: how many stay, which, and what does not count."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy.stages import SelectionRequest
from kvpolicy_plugins.selectors.kvcrush import KVCrush, spread
from tests.support.selecting import selected_by


def request_of(scores, count, **changes):
    """One head, whose slots are all candidates."""
    scores = torch.as_tensor(scores, dtype=torch.float32)[None, None]
    made = SelectionRequest(
        scores=scores,
        candidates=torch.ones_like(scores, dtype=torch.bool),
        counts=torch.tensor([[count]]),
        positions=torch.arange(scores.shape[-1]).expand_as(scores),
    )
    return attrs.evolve(made, **changes)


def places(chosen):
    return chosen[0, 0].nonzero().flatten().tolist()


SCORES = [5, 6, 9, 9, 1, 0, 7, 1, 0, 8, 2, 2]  # blocks of two: means 5.5, 9, 0.5, 4, 4, 2; the upper half are 5 to 9
PLAIN = KVCrush(2, 0)


def test_without_representatives_the_best_blocks_stay():
    assert places(PLAIN.select(request_of(SCORES, 4))) == [0, 1, 2, 3]
    assert places(PLAIN.select(request_of(SCORES, 6))) == [0, 1, 2, 3, 6, 7]  # of equal blocks the earlier one


def test_what_no_whole_block_fits_into_is_filled_by_score():
    assert places(PLAIN.select(request_of(SCORES, 5))) == [0, 1, 2, 3, 9]


@pytest.mark.parametrize(
    ("anchor", "expected"),
    [
        ("zeros", [4, 5]),  # nothing in it is important
        ("ones", [0, 1]),  # all of it is
        ("alternating", [8, 9]),  # not this, but that
    ],
)
def test_the_one_that_is_nearest_to_the_anchor_stays(anchor, expected):
    chosen = KVCrush(2, 1, anchor).select(request_of(SCORES, 4))
    assert places(chosen) == sorted([2, 3, *expected])


def test_the_mean_has_what_more_than_half_of_the_blocks_have():
    """Of six blocks three are important at first, and three behind: none is more than half."""
    mean = KVCrush(2, 1, "mean").select(request_of(SCORES, 4))
    assert places(mean) == places(KVCrush(2, 1, "zeros").select(request_of(SCORES, 4)))


def test_ranks_are_spread():
    """Of seven blocks three, at every second rank: the last is never taken."""
    distances = torch.tensor([[[3, 0, 2, 2, 5, 1, 4]]])
    evicted = torch.ones_like(distances, dtype=torch.bool)
    found = spread(distances, evicted, torch.tensor([[3]]))
    assert sorted(distances[found].tolist()) == [0, 2, 3]
    assert places(found) == [0, 1, 2]  # of the two at distance 2 the earlier one
    assert not spread(distances, evicted, torch.tensor([[0]])).any()
    assert spread(distances, evicted, torch.tensor([[7]])).all()


def test_as_many_representatives_as_stay_at_most():
    chosen = KVCrush(2, 99, "zeros").select(request_of(SCORES, 4))
    assert places(chosen) == [4, 5, 8, 9]  # ranks 0 and 3 of the distances 2, 2, 0, 1, 1, 0


@given(
    st.lists(st.integers(-3, 9), min_size=1, max_size=24),
    st.integers(1, 7),
    st.integers(0, 5),
    st.sampled_from(["zeros", "ones", "alternating", "random", "mean"]),
    st.data(),
)
def test_counts_are_exact_and_blocks_whole(numbers, size, representatives, anchor, data):
    """Also where the last block is shorter, and where slots between are protected."""
    candidates = torch.tensor([[data.draw(st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers)))]])
    room = int(candidates.sum())
    count = data.draw(st.integers(0, room))
    request = request_of(numbers, count, candidates=candidates)
    chosen = KVCrush(size, representatives, anchor).select(request)
    assert int(chosen.sum()) == count
    assert not (chosen & ~candidates).any()
    kept = chosen[candidates].split(min(size, len(numbers)))
    assert sum(bool(block.all()) for block in kept) >= count // min(size, len(numbers))
    scaled = attrs.evolve(request, scores=2 * request.scores + 8)
    if size in (1, 2, 4):  # means are exact
        assert torch.equal(KVCrush(size, representatives, anchor).select(scaled), chosen)


def test_only_the_half_that_is_important_counts():
    """Larger scores in the same half, and smaller ones in the other, do not move representatives."""
    for anchor in ("zeros", "ones", "alternating", "mean"):
        selector = KVCrush(2, 2, anchor)
        other = [score * 10 if score >= 5 else score / 10 for score in SCORES]
        assert places(selector.select(request_of(SCORES, 4))) == places(selector.select(request_of(other, 4)))


def test_random_anchors_differ_by_layer_and_compression_and_not_by_batch():
    scores = torch.rand(1, 1, 64, generator=torch.Generator().manual_seed(1))
    everywhere, counts = torch.ones_like(scores, dtype=torch.bool), torch.tensor([[16]])
    positions = torch.arange(64).expand_as(scores)
    selector = KVCrush(8, 1, "random")
    found = [selected_by(selector, scores, everywhere, counts, layer=layer, positions=positions) for layer in range(20)]
    found += [selected_by(selector, scores, everywhere, counts, positions=positions + later) for later in range(20)]
    assert len({tuple(places(one)) for one in found}) > 3
    batch = selector.select(
        SelectionRequest(
            scores.expand(2, 1, -1),
            everywhere.expand(2, 1, -1),
            counts.expand(2, 1),
            torch.cat([positions, positions + 5]),
        )
    )
    assert torch.equal(batch[:1], found[0])
    assert torch.equal(batch[1:], found[25])
