"""The bytes that a footprint gives heads of different length are never fewer than these take."""

import attrs
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy.stages import Column, Geometry
from kvpolicy.stages.formats import AsIs

DIM = 8


@attrs.frozen(eq=False)
class Packing(AsIs):
    """A format by its numbers alone."""

    group_size: int = 1
    step: int = 1


@st.composite
def forms(draw):
    """Groups of 1 to 8 entries, packed one or several at a time, that take at most as much as their numbers."""
    group = draw(st.integers(1, 8))
    columns = {"codes": Column((draw(st.integers(1, DIM * 4 * group)),), torch.uint8)}
    step, residual = group * draw(st.integers(1, 4)), draw(st.integers(0, 40))
    return Packing(columns, residual, group, step)


lengths = st.lists(st.integers(0, 200), min_size=1, max_size=8)


@given(forms(), lengths)
def test_heads_of_different_length_take_no_more_than_is_said(form, lengths):
    geometry = Geometry((0,), len(lengths), len(lengths), DIM)
    taken = sum(form.nbytes(length, geometry, torch.float32) for length in lengths)
    mean = -(-sum(lengths) // len(lengths))
    assert taken <= len(lengths) * form.nbytes(mean, geometry, torch.float32, uneven=True) + 1e-6


@given(forms(), st.integers(0, 200))
def test_what_is_said_is_near_what_even_heads_take(form, length):
    """No further than a group that is not complete, and what is packed later than it could be."""
    geometry = Geometry((0,), 2, 2, DIM)
    even, uneven = (form.nbytes(length, geometry, torch.float32, uneven=uneven) for uneven in (False, True))
    assert even <= uneven <= even + 2 * form.step * DIM * torch.float32.itemsize
