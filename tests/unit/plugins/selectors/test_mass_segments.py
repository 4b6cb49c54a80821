"""Segments of equal mass: against plain loops, for candidates with gaps, and where there are more than may stay."""

import itertools

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy.errors import ParameterError
from kvpolicy.stages import SelectionRequest
from kvpolicy_plugins.allocators.shared.apportion import swept
from kvpolicy_plugins.selectors.mass_segments import MassSegments
from kvpolicy_plugins.selectors.topk import TopK
from tests.support.selecting import selected_by
from tests.support.views import view_of


def cut(mass, step, shortest, longest):
    """Lengths of the segments of a list of masses, one after the other."""
    ends, total, number = {len(mass)}, 0.0, 1
    for index, share in enumerate(mass):
        total += share
        while number * step < 1 - 1e-9 and total >= number * step:
            ends.add(min(max(index, 1), len(mass) - 1))
            number += 1
    pieces, start = [], 0
    for end in sorted(ends - {0}):
        while end - start > longest:
            pieces.append(longest)
            start += longest
        pieces.append(end - start)
        start = end
    merged = []
    for piece in pieces:
        if merged and merged[-1] < shortest:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


SIZES = st.tuples(st.sampled_from([0.05, 0.125, 0.3, 1.0]), st.integers(1, 6), st.integers(0, 8), st.integers(0, 4))


@given(st.lists(st.lists(st.integers(0, 60), min_size=2, max_size=40), min_size=1, max_size=3), SIZES, st.data())
def test_segments_are_those_of_a_loop(numbers, sizes, data):
    """Of several heads at once, with slots between that are no candidates; masses are multiples of 1/4096."""
    step, shortest, more, least = sizes
    selector = MassSegments(mass=step, shortest=shortest, longest=shortest + more, least=least)
    slots = max(map(len, numbers)) + 6
    attention, inside = torch.zeros(1, len(numbers), slots), torch.zeros(1, len(numbers), slots, dtype=torch.bool)
    expected = []
    for head, own in enumerate(numbers):
        own[0] += 1
        places = sorted(data.draw(st.permutations(range(slots)))[: len(own)])
        attention[0, head] = torch.randn(slots)  # elsewhere it does not count
        attention[0, head, places], inside[0, head, places] = torch.tensor(own).float(), True
        mass = (torch.tensor(own).double() + 1e-12) / (torch.tensor(own).double() + 1e-12).sum()
        expected.append((cut(mass.tolist(), step, shortest, shortest + more), mass))
    segments = selector.segments(attention, inside)
    for head, (lengths, mass) in enumerate(expected):
        sums = torch.zeros(slots + 1).double()
        sums[: len(lengths)] = torch.stack([part.sum() for part in mass.split(lengths)])
        close = (mass.cumsum(0)[:, None] - step * torch.arange(1, 21)).abs().amin() < 1e-9
        if close:  # a cut that rounding decides
            continue
        assert segments.lengths[0, head, : len(lengths)].tolist() == lengths
        assert segments.lengths[0, head].sum() == len(mass)
        torch.testing.assert_close(segments.mass[0, head], sums[: segments.mass.shape[-1]])


def given_in_turn(room, total):
    taken = [0] * len(room)
    for index in itertools.cycle(range(len(room))):
        if sum(taken) == min(total, sum(room)):
            return taken
        taken[index] += taken[index] < room[index]
    return taken


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 60))
def test_what_is_taken_in_turn(room, total):
    assert swept(torch.tensor([room]), torch.tensor([total])).tolist() == [given_in_turn(room, total)]


def attending(attention, **changes):
    """A request of one head whose candidates have this attention and rising scores."""
    attention = torch.tensor([[attention]], dtype=torch.float32)
    scores = torch.arange(attention.shape[-1], dtype=torch.float32).expand_as(attention)
    given = {"candidates": torch.ones_like(attention, dtype=torch.bool), "counts": torch.tensor([[4]])}
    positions = torch.arange(attention.shape[-1]).expand_as(attention)
    return SelectionRequest(
        **{**given, "scores": scores, "positions": positions, "second_scores": attention, **changes}
    )


def places(chosen):
    return chosen[0, 0].nonzero().flatten().tolist()


SMALL = MassSegments(mass=0.26, shortest=2, longest=8, least=1)


def test_no_segment_is_wiped_out():
    """Four segments of five entries each: the best of each stays, where the four best would be the last ones."""
    request = attending([1.0] * 20)
    assert SMALL.segments(request.second_scores, request.candidates).lengths[0, 0, :5].tolist() == [5, 5, 5, 5, 0]
    assert places(SMALL.select(request)) == [4, 9, 14, 19]


@pytest.mark.parametrize(("count", "expected"), [(0, []), (1, [19]), (2, [4, 19]), (3, [4, 9, 19])])
def test_of_more_segments_than_may_stay_the_heaviest_keep_one(count, expected):
    """The last one is; among equals the earlier."""
    assert places(SMALL.select(attending([1.0] * 19 + [1.2], counts=torch.tensor([[count]])))) == expected


def test_one_segment_keeps_the_best():
    selector, request = attrs.evolve(SMALL, mass=1.0, longest=1000), attending([3.0, 1, 2, 5, 0, 0, 1, 9, 2])
    scores = torch.tensor([[[3.0, 1, 4, 1, 5, 9, 2, 6, 5]]])
    request = attrs.evolve(request, scores=scores)
    best = selected_by(TopK(), scores, request.candidates, request.counts)
    assert torch.equal(selector.select(request), best)


def test_quotas_follow_the_mass():
    """Three quarters of it are in the second half."""
    request = attending([1.0] * 16 + [3.0] * 16, counts=torch.tensor([[16]]))
    chosen = attrs.evolve(SMALL, least=0).select(request)
    assert chosen[0, 0, :16].sum() == 4
    assert chosen.sum() == 16


def test_attention_is_that_of_the_window_over_the_candidates():
    """Two query heads, three queries; neighbours are averaged over three, with zeros outside."""
    generator = torch.Generator().manual_seed(2)
    keys, queries = torch.randn(1, 1, 12, 4, generator=generator), torch.randn(1, 2, 3, 4, generator=generator)
    view = view_of(keys, queries=queries, sinks=1, recent=3)
    pool = attrs.evolve(SMALL.pool, size=3)
    found = attrs.evolve(SMALL, queries=3, pool=pool).second_scores(view)[0, 0, 1:9]
    own = ((queries[0] @ keys[0, 0, 1:9].T) / 2).softmax(-1).mean((0, 1))
    padded = torch.nn.functional.pad(own, (1, 1))
    torch.testing.assert_close(found, (padded[:-2] + padded[1:-1] + padded[2:]) / 3)


@pytest.mark.parametrize("wrong", [torch.nan, -torch.inf])
def test_attention_that_is_no_number_is_no_mass(wrong):
    clean = [1.0, 0, 1, 1, 1, 1, 0, 1, 1, 1]
    spoilt = [share or wrong for share in clean]
    assert places(SMALL.select(attending(spoilt))) == places(SMALL.select(attending(clean)))
    assert len(places(SMALL.select(attending([wrong] * 10)))) == 4


def test_sizes_that_contradict_each_other_are_refused():
    with pytest.raises(ParameterError, match="shortest: must be <= longest, which is 7: 8"):
        MassSegments(shortest=8, longest=7)


def test_the_attention_must_be_given():
    with pytest.raises(ValueError, match="give it what its second_scores returned"):
        SMALL.select(attending([1.0] * 5, second_scores=None))
