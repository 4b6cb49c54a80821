"""The observation window against a list per row."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy.cache.observation_window import ObservationWindow, last_in_step
from kvpolicy.stages import Geometry

SIZE, HEADS, DIM = 4, 2, 3
PLAN = SimpleNamespace(
    needs=SimpleNamespace(queries=SIZE), geometry=Geometry((0,), HEADS, HEADS, DIM), dtype=torch.float32
)


def entries(rows, count, start):
    """Queries that say which they are."""
    names = start + torch.arange(rows * count).reshape(rows, 1, count, 1)
    return names.expand(rows, HEADS, count, DIM).float()


@st.composite
def histories(draw):
    """What happens to a window: forwards with pads, rollbacks, moves of rows, static steps, rows whose queries go."""
    forwards = st.tuples(st.just("add"), st.integers(1, 9), st.integers(0, 2**20))
    undone = st.tuples(st.just("forget"), st.integers(0, 5), st.just(0))
    moves = st.tuples(st.just("select"), st.integers(1, 3), st.integers(0, 2**20))
    static = st.tuples(st.just("static"), st.integers(1, 7), st.just(0))
    dropped = st.tuples(st.just("drop"), st.integers(0, 3), st.just(0))
    return draw(st.lists(st.one_of(forwards, forwards, undone, moves, static, dropped), min_size=1, max_size=12))


@given(histories())
def test_the_window_holds_the_newest_queries_of_each_row(history):
    window, rows = ObservationWindow(SIZE), [[], []]
    sessions = {count: ObservationWindow.fixed(PLAN, count, torch.device("cpu")) for count in (1, 2, 3)}
    real, name, undone = [0, 0], 0, False
    for what, count, seed in history:
        generator = torch.Generator().manual_seed(seed)
        if what == "add":
            valid = torch.rand(len(rows), count, generator=generator) < (0.6 if seed % 2 else 2)
            queries = entries(len(rows), count, name)
            positions = torch.full((len(rows), count), -1)
            for row, held in enumerate(rows):
                for column in range(count):
                    if valid[row, column]:
                        positions[row, column] = real[row]
                        held.append((real[row], queries[row, 0, column, 0].item()))
                        real[row] += 1
            name += len(rows) * count
            window.add(queries, positions, padded=not bool(valid.all()))
        elif what == "forget":
            real = [max(0, one - count) for one in real]
            rows = [[one for one in held if one[0] < limit] for held, limit in zip(rows, real, strict=True)]
            window.forget(torch.tensor(real))
            undone = True
        elif what == "drop":
            gone = [row for row in range(len(rows)) if count >> row & 1]
            window.drop(gone)
            rows = [[] if row in gone else held for row, held in enumerate(rows)]
            assert any(rows) or undone or not window.nbytes
        elif what == "static":
            window = _static_steps(sessions[len(rows)], window, rows, real, count, name, undone=undone)
            real, name = [place + count for place in real], name + count * len(rows)
        else:
            order = torch.randint(0, len(rows), (count,), generator=generator).tolist()
            window = window.selected(order)
            rows, real = [list(rows[row]) for row in order], [real[row] for row in order]
        _compare(window, rows, undone=undone)


def _static_steps(fixed, window, rows, real, count, name, *, undone):
    """The window behind some steps of fixed shapes; both copies of the place of the oldest query agree behind each."""
    places = [tensor.data_ptr() for tensor in fixed.in_step]
    fixed.fill(window, len(rows))
    for step in range(count):
        _compare(fixed, rows, undone=undone)
        queries = entries(len(rows), 1, name + step * len(rows))
        fixed.add_in_step(queries, torch.tensor(real, dtype=torch.int32) + step)
        fixed.note_step()
        for row, held in enumerate(rows):
            held.append((real[row] + step, queries[row, 0, 0, 0].item()))
        for host, device in zip(fixed.last(range(len(rows))), last_in_step(fixed.in_step), strict=True):
            assert torch.equal(host, device)
    assert [tensor.data_ptr() for tensor in fixed.in_step] == places
    window = fixed.selected(range(len(rows)))
    assert not window.in_step
    fixed.in_step[0].fill_(torch.nan)  # another cache was in, and has left anything
    return window


def _compare(window, rows, *, undone):
    queries, positions = window.last(range(len(rows)))
    if queries is None:
        assert not any(rows) or undone
        return
    assert queries.isfinite().all()
    for row, held in enumerate(rows):
        real = positions[row] >= 0
        found = list(zip(positions[row][real].tolist(), queries[row, 0][real][:, 0].tolist(), strict=True))
        assert real.tolist() == sorted(real.tolist())
        assert found == held[len(held) - len(found) :]
        assert len(found) == min(SIZE, len(held)) or undone  # only a rollback may leave fewer than there were


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_exactly_the_last_ones_are_held_without_rollbacks(count):
    window = ObservationWindow(SIZE)
    for step in range(30):
        window.add(entries(1, count, step * count), torch.arange(step * count, (step + 1) * count)[None], padded=False)
        total = (step + 1) * count
        _, positions = window.last([0])
        assert positions.tolist() == [list(range(max(0, total - SIZE), total))]


def test_the_buffer_keeps_its_size_and_its_place():
    window = ObservationWindow(SIZE)
    window.add(entries(2, 9, 0), torch.arange(9).expand(2, 9), padded=False)
    size, place = window.nbytes, window._queries.data_ptr()
    for step in range(40):
        window.add(entries(2, 1, step), torch.full((2, 1), 9 + step), padded=False)
    assert window.nbytes == size == 2 * SIZE * (HEADS * DIM * 4 + 8)
    assert window._queries.data_ptr() == place


def test_rows_can_be_asked_for_on_their_own():
    window = ObservationWindow(SIZE)
    window.add(entries(3, 2, 0), torch.arange(2).expand(3, 2), padded=False)
    queries, positions = window.last([2])
    assert queries[0, 0, :, 0].tolist() == [4, 5]
    assert positions.tolist() == [[0, 1]]


def test_a_window_of_no_queries_holds_none():
    window = ObservationWindow(0)
    window.add(entries(1, 2, 0), torch.arange(2)[None], padded=False)
    window.forget(torch.tensor([0]))
    window = window.selected([0])
    assert window.last([0]) == (None, None)
    assert window.nbytes == 0


def test_a_window_of_fixed_shapes_of_no_queries_holds_none():
    plan = SimpleNamespace(needs=SimpleNamespace(queries=0), geometry=PLAN.geometry, dtype=torch.float32)
    window = ObservationWindow.fixed(plan, 2, torch.device("cpu"))
    window.fill(ObservationWindow(0), 2)
    window.add_in_step(entries(2, 1, 0), torch.zeros(2, dtype=torch.int32))
    window.note_step()
    assert window.last([0, 1]) == last_in_step(window.in_step) == (None, None)
    assert window.nbytes == 0
