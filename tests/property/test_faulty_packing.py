"""Entries that are NaN or infinite are not packed, nor is what follows them in their row; the other rows go on."""

import copy
import warnings

import pytest
import torch

from kvpolicy.cache.storage.packing import pack_layers
from kvpolicy.errors import NonFiniteScoreWarning
from kvpolicy.plan.plan import POSITIONS
from tests.property.test_packed_layers import DIM, HEADS, STORES, entries, plan_of
from tests.support.driving import feed, new_layer
from tests.support.storage import segment

PACKING = [name for name in STORES if name != "plain"]
SIZES = (21, 1, 1, 1, 5, 1, 1, 1, 1, 1, 1)
PLACES = {"in the prompt": 6, "at its end": 20, "in a later token": 22, "in a chunk": 26}
ROWS, ROW = 3, 1


def spoilt(steps, half, place, wrong, head=0):
    """The same forwards with a number that is not finite in one head of row `ROW`."""
    steps, start = copy.deepcopy(steps), 0
    for step in steps:
        count = step[0].shape[2]
        if start <= place < start + count:
            step[half][ROW, head, place - start, 3] = wrong
        start += count
    return steps


def forwards(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [entries(generator, ROWS, size) for size in SIZES]


def contents(layer, row):
    """All that a row holds, as attention sees it."""
    names = ("keys", "values", *layer.storage.slots.columns)
    return [segment(layer.storage, name, row, head) for name in names for head in range(HEADS)]


def said(found):
    return [str(one.message) for one in found if issubclass(one.category, NonFiniteScoreWarning)]


@pytest.mark.parametrize("half", [0, 1], ids=["keys", "values"])
@pytest.mark.parametrize("budget", ["100%", 14])
@pytest.mark.parametrize("store", PACKING)
def test_other_rows_do_not_notice(store, budget, half):
    plan, steps = plan_of(store, budget), forwards()
    usual = new_layer(plan)
    expected = [feed(usual, *step) for step in steps]
    for index, place in enumerate(PLACES.values()):
        wrong, layer, seen = (torch.nan, torch.inf, -torch.inf)[index % 3], new_layer(plan), 0
        for step, plain in zip(spoilt(steps, half, place, wrong), expected, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NonFiniteScoreWarning)
                output = feed(layer, *step)
            seen += step[0].shape[2]
            layer.storage.check_integrity()
            torch.testing.assert_close(output[[0, 2]], plain[[0, 2]])  # products of other shapes round otherwise
            if seen <= place:
                assert torch.equal(output, plain)
            for name in range(2):  # nothing else of the row has become NaN
                for head in range(HEADS):
                    found = segment(layer.storage, ("keys", "values")[name], ROW, head)
                    good = layer.storage.slots.segment(POSITIONS, ROW, head) != place
                    assert found[good].isfinite().all()
        for row in (0, 2):
            torch.testing.assert_close(contents(layer, row), contents(usual, row))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("store", PACKING)
def test_a_faulty_row_is_held_unpacked_and_says_so_once(store, wrong):
    plan, place = plan_of(store), 6
    layer, steps = new_layer(plan), spoilt(forwards(), 0, place, wrong)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for step in steps:
            feed(layer, *step)
    assert said(found) == ["keys of row 1 are NaN or infinite: they, and what follows, are held unpacked"]
    half, form = layer.storage.keys, plan.formats[0].keys
    packed_lengths = form.packed_length(sum(SIZES))
    assert half.packed_lengths[0] == half.packed_lengths[2] == (packed_lengths,) * HEADS
    before = place // form.group_size * form.group_size
    assert half.packed_lengths[ROW] == ((before, before) if form.joint else (before, packed_lengths))
    assert layer.storage.values.packed_lengths[ROW] == layer.storage.values.packed_lengths[0]
    held, whole = segment(layer.storage, "keys", ROW, 0), torch.cat([step[0][ROW, 0] for step in steps])
    assert torch.equal(held[before:].nan_to_num(7.0), whole[before:].nan_to_num(7.0))
    plain = ROWS * HEADS * (sum(SIZES) + 16) * DIM * 4  # storage grows by 16 slots or more
    assert half.nbytes <= 2 * plain


@pytest.mark.parametrize("store", PACKING)
@pytest.mark.parametrize(("ragged", "place"), [(False, 5), (True, 5), (False, 20)])
def test_once_the_fault_is_evicted_the_row_is_packed_and_right_again(store, ragged, place):
    if ragged and STORES[store] != "plain" and plan_of(store).spec.store.joint:
        store = "kivi"  # heads of a joint store hold equally many entries
    plan, generator = plan_of(store, 12, ragged=ragged), torch.Generator().manual_seed(1)
    layer = new_layer(plan)
    steps = spoilt([entries(generator, ROWS, size) for size in (20, *[1] * 16)], 0, place, torch.nan)
    keys, values = (torch.cat([step[part] for step in steps], 2) for part in range(2))
    for count, step in enumerate(steps):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteScoreWarning)
            output = feed(layer, *step)
        if count < (1 if place == 5 else 12):
            continue
        assert output.isfinite().all()
        for name in ("keys", "values"):
            forms = getattr(plan.formats[0], name)
            lengths = layer.storage.slots.lengths
            assert getattr(layer.storage, name).packed_lengths == tuple(
                tuple(map(forms.packed_length, row)) for row in lengths
            )
    for head in range(HEADS):
        positions = layer.storage.slots.segment(POSITIONS, ROW, head).long()
        assert head or place not in positions
        own = keys[ROW, head, positions], values[ROW, head, positions]
        for name, exact in zip(("keys", "values"), own, strict=True):
            assert (segment(layer.storage, name, ROW, head) - exact).abs().max() < 2.5  # packed, of numbers up to 4


def test_what_is_undone_is_no_fault_any_more():
    plan = plan_of("fp8")
    layer, (first, wrong, again) = new_layer(plan), (entries(torch.Generator().manual_seed(n), 1, 4) for n in range(3))
    layer.activate_past_recording()
    feed(layer, *first)
    layer.crop(0)
    wrong[0][0, 0, 1] = torch.nan
    with pytest.warns(NonFiniteScoreWarning, match="held unpacked"):
        feed(layer, *wrong)
    layer.crop(-4)
    feed(layer, *again)
    layer.crop(0)
    assert layer.storage.keys.packed_lengths == ((7, 7),)
    for head in range(HEADS):
        assert segment(layer.storage, "keys", 0, head).isfinite().all()


def test_rows_that_are_chosen_take_their_fault_along():
    plan, steps = plan_of("kivi"), spoilt(forwards(), 1, 6, torch.inf)
    layer = new_layer(plan)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        feed(layer, *steps[0])
        layer.select_rows([1, 0, 1])
        for step in steps[1:]:
            feed(layer, *[part[[1, 0, 1]] for part in step])
    assert len(said(found)) == 1
    packed_lengths = layer.storage.values.packed_lengths
    assert packed_lengths[0] == packed_lengths[2] == (6, packed_lengths[1][1])
    assert packed_lengths[1][0] == packed_lengths[1][1] > 6


def test_a_fault_that_stays_through_compressions_is_told_once():
    """A value that nobody looks at before it is attended to: its entry is kept for its key."""
    plan, generator = plan_of("fp8", 40), torch.Generator().manual_seed(0)
    layer, steps = new_layer(plan), [entries(generator, 2, size) for size in (39, *[1] * 16)]
    for keys, _, queries in steps:
        queries.fill_(1.0)
        keys[:, :, 0] += 2.0 if keys.shape[2] > 1 else 0.0
    steps[0][1][1, 0, 0, 3] = torch.inf
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for step in steps:
            feed(layer, *step)
    assert layer.stats.compressions >= 3
    assert 0 in layer.storage.slots.segment(POSITIONS, 1, 0)
    assert layer.storage.values.packed_lengths[1][0] == 0
    assert len(said(found)) == 1


def test_what_was_held_unpacked_is_packed_when_the_fault_is_undone():
    layer, generator = new_layer(plan_of("fp8")), torch.Generator().manual_seed(0)
    wrong, good = entries(generator, 1, 4), entries(generator, 1, 4)
    wrong[0][0, :, 0], wrong[1][0, :, 0] = torch.nan, torch.nan
    with pytest.warns(NonFiniteScoreWarning, match="held unpacked"):
        feed(layer, *wrong)
    assert layer.storage.is_plain
    pack_layers([layer.storage], [layer.limit])  # looks no further, and says nothing again: warnings are errors here
    layer.crop(-4)
    feed(layer, *good)
    assert layer.storage.keys.packed_lengths == layer.storage.values.packed_lengths == ((3, 3),)
