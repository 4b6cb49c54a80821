"""The largest batch."""

from hypothesis import given
from hypothesis import strategies as st

from kvpolicy.bench.generation.search import largest


def search(limit, most, expired=lambda: False):
    tried = []

    def fits(rows):
        tried.append(rows)
        return rows <= limit

    return largest(fits, most, expired), tried


@given(st.integers(0, 5000), st.integers(1, 4096))
def test_what_is_found_fits_and_is_the_largest_to_one_part_in_sixteen(limit, most):
    found, tried = search(limit, most)
    best = min(limit, most)

    assert found <= best
    assert best - found <= max(1, found // 16) - (found < 16)
    assert all(1 <= one <= most for one in tried)
    assert len(tried) == len(set(tried)) <= 20


def test_doubles_first():
    assert search(100, 1024)[1][:8] == [1, 2, 4, 8, 16, 32, 64, 128]


def test_takes_what_it_has_when_time_is_up():
    assert search(100, 1024, lambda: True) == (1, [1])
