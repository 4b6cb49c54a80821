"""What holds for the built-in readers whatever they are asked."""

import attrs
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvpolicy.stages import ReadRequest, Site
from kvpolicy.stages.ordering import best_first
from kvpolicy_plugins.readers.latent_topk import LatentTopK
from kvpolicy_plugins.readers.pages import Pages
from kvpolicy_plugins.readers.shared.top_slots import top_slots
from tests.property.layers import generators, layers, scored
from tests.support.decisions import Decisions
from tests.support.latents import formats_of, only_rows, read_request, samples

latent_readers = st.builds(
    LatentTopK,
    sinks=st.integers(0, 4),
    critical=st.integers(1, 12),
    recent=st.integers(0, 8),
    dims=st.sampled_from((0.3, 0.5, 1.0)),
    min_length=st.sampled_from((0, 15)),
)


@st.composite
def page_readers(draw, groups=("max", "mean", "sum")):
    page = draw(st.integers(1, 9))
    return Pages(page, page + draw(st.integers(0, 30)), draw(st.sampled_from(groups)), dense_first=0)


@st.composite
def latent_requests(draw):
    """Rows of different lengths, whose newest 0, 3 or 7 entries are not packed."""
    sample = draw(samples())
    slots = sample.keys.shape[2]
    lengths = torch.tensor([draw(st.integers(1, slots)) for _ in sample.keys])
    form = formats_of(sample, residual=draw(st.sampled_from((0, 3, 7)))).keys
    return read_request(sample, form, lengths)


def asked_for_pages(view, reader):
    """What `reader` is asked when the entries of a layer are as in `view`."""
    full = view.keys.shape[2] // reader.page * reader.page
    form = reader.pages(Site(view.geometry, view.keys.dtype))
    pages = form.encode(view.keys[:, :, :full], view.positions[:, :, :full])
    newest = view.positions.amax((1, 2))
    return ReadRequest(view.queries[:, :, -1], newest, view.positions, view.geometry, pages=pages)


def read_slots(reader, request):
    """[B][K] lists of the slots that are read; checks their order."""
    chosen = reader.choose(request)
    lengths = (request.positions >= 0).sum(-1).tolist()
    if chosen is None:
        return [[list(range(length)) for length in row] for row in lengths]
    found = [[[slot for slot in head if slot >= 0] for head in row] for row in chosen.tolist()]
    padded = [[head + [-1] * (chosen.shape[-1] - len(head)) for head in row] for row in found]
    assert padded == chosen.tolist()
    assert all(head == sorted(set(head)) for row in found for head in row)
    assert all(
        head[-1:] < [length]
        for row, ns in zip(found, lengths, strict=True)
        for head, length in zip(row, ns, strict=True)
    )
    return found


@given(latent_requests(), latent_readers)
def test_latent_topk_reads_what_a_plain_search_finds(request, reader):
    scores = reader.scores(request).float().tolist()
    most = reader.sinks + reader.critical + reader.recent
    for row, heads in enumerate(read_slots(reader, request)):
        length, packed_lengths = int((request.positions[row, 0] >= 0).sum()), int(request.packed_lengths[row, 0])
        middle = range(reader.sinks, min(packed_lengths, length - reader.recent))
        best = sorted(middle, key=lambda slot: (-scores[row][slot], slot))[: reader.critical]
        expected = sorted({*range(length)} - {*middle} | {*best})
        whole = length < reader.min_length or request.positions.shape[2] <= most
        assert heads == [list(range(length)) if whole else expected] * len(heads)


@given(latent_requests(), latent_readers)
def test_latent_topk_reads_the_first_the_last_and_as_many_as_it_says(request, reader):
    most = reader.sinks + reader.critical + reader.recent
    residual = request.format.residual_length
    for row, heads in enumerate(read_slots(reader, request)):
        length = int((request.positions[row, 0] >= 0).sum())
        read = set(heads[0])
        assert read >= {*range(min(length, reader.sinks)), *range(max(0, length - reader.recent), length)}
        assert read >= {*range(int(request.packed_lengths[row, 0]), length)}
        if length < reader.min_length:
            assert len(read) == length
        elif residual <= reader.recent:
            assert len(read) == min(length, most)


@given(latent_requests(), latent_readers, generators)
def test_latent_topk_reads_of_a_row_what_it_would_read_alone(request, reader, random):
    decisions = Decisions()
    with decisions.watched():
        together = read_slots(reader, request)
    rows = torch.randperm(len(together), generator=random)
    with decisions.followed():
        assert read_slots(reader, only_rows(request, rows)) == [together[row] for row in rows.tolist()]
        for row in range(len(together)):
            length = int((request.positions[row, 0] >= 0).sum())
            alone = only_rows(request, [row])
            alone = attrs.evolve(alone, positions=alone.positions[..., :length])
            assert read_slots(reader, alone) == [together[row]]


@given(latent_requests(), latent_readers, st.integers(1, 5))
def test_what_one_query_leaves_the_next_may_read(request, reader, seed):
    """Nothing is destroyed: after any other request, the first one is answered as before."""
    before = read_slots(reader, request)
    random = torch.Generator().manual_seed(seed)
    reader.choose(attrs.evolve(request, queries=torch.randn(request.queries.shape, generator=random).double()))
    assert read_slots(reader, request) == before


@given(latent_requests(), st.sampled_from((torch.nan, 1e30)))
def test_slots_without_entries_are_never_scored(request, junk):
    reader = LatentTopK(1, 3, 2)
    slots = torch.arange(request.packed["latent"].shape[2])
    behind = (slots >= request.packed_lengths[:, :1])[:, None, :, None].any(1)
    latents = request.packed["latent"].masked_fill(behind[:, None], junk)
    assert read_slots(reader, attrs.evolve(request, packed={"latent": latents})) == read_slots(reader, request)


@given(layers(contents=("normal", "clustered", "whole numbers", "all equal")), page_readers())
def test_no_key_of_a_page_answers_better_than_its_bound(view, reader):
    request = asked_for_pages(view, reader)
    bounds = reader.bounds(request)
    logits = request.queries.unflatten(1, (view.keys.shape[1], -1)) @ view.keys.transpose(-1, -2)
    full = bounds.shape[-1] * reader.page
    worth = {"max": logits.amax(2), "mean": logits.mean(2), "sum": logits.sum(2)}[reader.group]
    largest = worth[..., :full].unflatten(-1, (-1, reader.page)).amax(-1) if full else bounds
    assert (bounds >= largest - 1e-4 * (1 + largest.abs())).all()


@given(layers(), page_readers())
def test_a_page_of_one_entry_is_bounded_by_its_own_answer(view, reader):
    one = attrs.evolve(reader, page=1)
    request = asked_for_pages(view, one)
    logits = request.queries.unflatten(1, (view.keys.shape[1], -1)) @ view.keys.transpose(-1, -2)
    reduced = {"max": logits.amax(2), "mean": logits.mean(2), "sum": logits.sum(2)}[reader.group]
    assert_close(one.bounds(request), reduced, atol=1e-4, rtol=1e-4)


@given(layers(), page_readers())
def test_pages_reads_what_a_plain_search_finds(view, reader):
    request = asked_for_pages(view, reader)
    bounds = reader.bounds(request).tolist()
    for row, heads in enumerate(read_slots(reader, request)):
        for head, found in enumerate(heads):
            length = int((request.positions[row, head] >= 0).sum())
            if length <= reader.budget:
                assert found == list(range(length))
                continue
            newest = (length - 1) // reader.page
            room = (reader.budget - (length - newest * reader.page)) // reader.page
            best = sorted(range(newest), key=lambda page: (-bounds[row][head][page], page))[:room]
            expected = [slot for slot in range(length) if slot // reader.page in {*best, newest}]
            assert found == expected
            assert reader.budget - reader.page < len(found) <= reader.budget


@given(layers(contents=("normal", "clustered")), page_readers(), generators)
def test_heads_and_rows_choose_their_pages_apart(view, reader, random):
    request, decisions = asked_for_pages(view, reader), Decisions()
    with decisions.watched():
        together = read_slots(reader, request)
    order = torch.randperm(view.keys.shape[1], generator=random)
    swapped = attrs.evolve(
        request,
        queries=request.queries.unflatten(1, (len(order), -1))[:, order].flatten(1, 2),
        positions=request.positions[:, order],
        pages={name: column[:, order] for name, column in request.pages.items()},
    )
    assert read_slots(reader, swapped) == [[row[head] for head in order.tolist()] for row in together]
    for row in range(len(together)):
        alone = attrs.evolve(
            request,
            queries=request.queries[[row]],
            positions=request.positions[[row]],
            pages={name: column[[row]] for name, column in request.pages.items()},
        )
        with decisions.followed():
            assert read_slots(reader, alone) == [together[row]]


@given(layers(), st.integers(1, 20))
def test_with_room_for_everything_everything_is_read(view, page):
    reader = Pages(page, max(page, view.keys.shape[2]), dense_first=0)
    assert reader.choose(asked_for_pages(view, reader)) is None


@given(layers(), page_readers(), st.sampled_from((torch.nan, -1e30, 1e30)))
def test_pages_that_are_not_full_are_never_judged(view, reader, junk):
    request = asked_for_pages(view, reader)
    pages = torch.arange(request.pages["minimum"].shape[2])
    behind = pages >= (request.positions >= 0).sum(-1, keepdim=True) // reader.page
    other = {name: column.masked_fill(behind[..., None], junk) for name, column in request.pages.items()}
    assert read_slots(reader, attrs.evolve(request, pages=other)) == read_slots(reader, request)


@given(scored(), st.integers(0, 90))
def test_the_leading_ones_are_the_first_of_the_order(compared, count):
    scores, candidates = compared
    assert torch.equal(top_slots(scores, candidates, count), best_first(scores, candidates)[..., :count])
