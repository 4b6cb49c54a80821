"""Where segments lie."""

import pytest
import torch

from kvpolicy.cache.storage.layout import Layout, per_segment

CPU = torch.device("cpu")


def test_segments_follow_each_other_row_by_row_and_head_by_head():
    layout = Layout(((2, 3), (0, 4)))
    assert layout.offsets == ((0, 2), (5, 5))
    assert (layout.rows, layout.heads, layout.slots) == (2, 2, 9)


@pytest.mark.parametrize(("capacity", "uniform"), [(((2, 2), (2, 2)), 2), (((2, 3),), None), (((0,),), 0), ((), None)])
def test_a_common_capacity_is_recognised(capacity, uniform):
    assert Layout(capacity).uniform == uniform


def test_even_layouts_are_equal_when_their_numbers_are():
    assert Layout.even(2, 3, 5) == Layout(((5, 5, 5), (5, 5, 5)))
    assert Layout.even(2, 3, 5) != Layout.even(3, 2, 5)


def test_numbers_come_as_a_tensor_per_row_and_head():
    layout = Layout(((2, 3), (0, 4)))
    assert layout.offsets_on(CPU).tolist() == [[0, 2], [5, 5]]
    assert layout.on(((1, 2), (3, 4)), CPU).dtype == torch.long


def test_no_row_is_a_layout_too():
    assert Layout(()).heads == 0
    assert Layout(()).slots == 0


def test_a_table_asks_for_every_row_and_head():
    assert per_segment(2, 3, lambda row, head: 10 * row + head) == ((0, 1, 2), (10, 11, 12))
