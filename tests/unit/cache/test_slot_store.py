"""Cases of the store that random histories seldom reach; see tests/property/test_store_machine.py for the rest."""

import pytest
import torch

from kvpolicy.cache.compaction.compaction_plan import CompactionPlan
from kvpolicy.cache.storage.layout import Layout
from kvpolicy.cache.storage.slot_store import SlotStore
from kvpolicy.errors import CacheError
from kvpolicy.plan.plan import POSITIONS
from kvpolicy.stages import Column


def filled(*lengths, slack=0):
    """A store of one head per row; the positions of a row count from ten times its number."""
    store = SlotStore({POSITIONS: Column((), torch.int32, -1)}, len(lengths), 1, torch.device("cpu"))
    rows = range(len(lengths))
    store.replace(rows, entries(*rows, count=max(lengths)), tuple((n,) for n in lengths), layout(*lengths, slack=slack))
    return store


def entries(*rows, count):
    return {POSITIONS: torch.stack([torch.arange(10 * row, 10 * row + count)[None] for row in rows]).int()}


def layout(*lengths, slack=0):
    return Layout(tuple((length + slack,) for length in lengths))


def positions(store):
    return [store.segment(POSITIONS, row, 0).tolist() for row in range(store.layout.rows)]


def test_rows_that_stay_may_move_while_the_size_does_not_change():
    store = filled(5, 2, 3, slack=2)
    store.replace([0, 2], entries(4, 5, count=5), ((3,), (5,)), layout(3, 2, 5, slack=2))
    assert positions(store) == [[40, 41, 42], [10, 11], [50, 51, 52, 53, 54]]
    store.check_integrity()


def test_a_row_alone_is_replaced_in_place():
    store = filled(5, 2, slack=2)
    place = store.tensors[POSITIONS].data_ptr()
    store.replace([1], entries(7, count=3), ((3,),), Layout(((7,), (4,))))
    assert positions(store) == [[0, 1, 2, 3, 4], [70, 71, 72]]
    assert store.tensors[POSITIONS].data_ptr() == place


def test_more_entries_than_slots_are_refused_before_anything_has_changed():
    store = filled(5, 2)
    with pytest.raises(CacheError, match="do not fit"):
        store.replace([1], entries(7, count=3), ((3,),), layout(5, 2))
    assert positions(store) == [[0, 1, 2, 3, 4], [10, 11]]


def test_uneven_segments_have_no_common_view():
    with pytest.raises(CacheError, match="no common capacity"):
        filled(5, 2).dense(POSITIONS)


def test_a_contradiction_is_found():
    store = filled(5, 2, slack=2)
    store.tensors[POSITIONS][5] = 3
    with pytest.raises(CacheError, match="row 0 head 0: entries behind the length 5"):
        store.check_integrity()
    store._added = 3
    with pytest.raises(CacheError, match="row 0 head 0: 8 entries in 7 slots"):
        store.check_integrity()


def test_a_short_row_beside_a_long_one_does_not_grow_beyond_the_limit():
    store = filled(90, 3)
    store.append({POSITIONS: torch.full((2, 1, 1), 95, dtype=torch.int32)}, 12)
    assert store.layout.capacity == ((91,), (12,))
    store.append({POSITIONS: torch.full((2, 1, 1), 96, dtype=torch.int32)}, 200)
    assert store.layout.capacity == ((92 + 16,), (12,))
    store.check_integrity()


def test_storage_is_at_most_an_eighth_longer_than_what_is_held():
    """Or 16 slots; whatever is appended, as long as nothing is dropped."""
    store = filled(500)
    for length in range(501, 1200):
        store.append({POSITIONS: torch.full((1, 1, 1), length, dtype=torch.int32)}, 10**6)
        assert store.layout.capacity[0][0] <= length * 9 / 8


def test_only_the_oldest_leave_at_the_front():
    store = filled(5, 2, 4)
    store.drop_front(((2,), (0,), (4,)), layout(3, 2, 0, slack=1))
    assert positions(store) == [[2, 3, 4], [10, 11], []]
    store.extend(entries(7, 8, 9, count=2), ((1,), (0,), (2,)), 9)
    assert positions(store) == [[2, 3, 4, 70], [10, 11], [90, 91]]
    store.check_integrity()


@pytest.mark.parametrize("capacities", [(7, 4), (5, 5), (3, 2)], ids=["in place", "even", "tight"])
def test_what_is_kept_closes_up_and_the_other_rows_stay(capacities):
    store = filled(5, 2, slack=2)
    store.keep(CompactionPlan([0], torch.tensor([[[0, 2, 4]]])), Layout(tuple((size,) for size in capacities)))
    assert positions(store) == [[0, 2, 4], [10, 11]]
    assert (store.tensors[POSITIONS] >= 0).sum() == 5
    store.check_integrity()


def test_all_rows_are_kept_in_storage_that_is_alike():
    store = filled(4, 4, slack=1)
    store.keep(CompactionPlan([0, 1], torch.tensor([[[1, 3]], [[0, 1]]])), layout(4, 4, slack=1))
    assert positions(store) == [[1, 3], [10, 11]]
    assert (store.tensors[POSITIONS] >= 0).sum() == 4


def test_a_segment_without_a_slot_may_be_the_last():
    store = filled(5, 0)
    store.keep(CompactionPlan([0, 1], torch.tensor([[[1, 2]], [[-1, -1]]])), layout(2, 0))
    assert positions(store) == [[1, 2], []]
    store.check_integrity()


def test_one_move_serves_storages_that_lie_differently():
    """As keys and positions do, when one of them has grown."""
    move = CompactionPlan([0, 1], torch.tensor([[[1, 3]], [[0, 2]]]))
    for slack in (0, 2):
        store = filled(4, 4, slack=slack)
        store.keep(move, layout(4, 4, slack=slack))
        assert positions(store) == [[1, 3], [10, 12]]
