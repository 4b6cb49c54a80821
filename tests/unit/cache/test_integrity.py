"""What another thread does to make room for its own cache is seen by none that changes or reads the first."""

import threading

import pytest

from kvpolicy.cache.integrity import Integrity
from kvpolicy.errors import CacheError


def moved_meanwhile(integrity, inside):
    """Whether entries were moved by another thread while the body of `inside` was running, and were afterwards."""
    moved = threading.Event()

    def move():
        with integrity.hand_over():
            moved.set()

    thread = threading.Thread(target=move)
    with inside:
        thread.start()
        early = moved.wait(0.1)
    thread.join()
    return early, moved.is_set()


@pytest.mark.parametrize(
    "inside",
    [
        lambda integrity: integrity.change("crop"),
        lambda integrity: integrity.renewal(),
        lambda integrity: integrity.unmoved,
    ],
    ids=["change", "renewal", "unmoved"],
)
def test_entries_move_before_a_change_or_behind_it(inside):
    integrity = Integrity([0, 1])
    assert moved_meanwhile(integrity, inside(integrity)) == (False, True)
    assert integrity.is_whole


def test_a_move_that_fails_leaves_a_cache_that_nobody_can_go_on_with():
    integrity = Integrity([0])
    with pytest.raises(ZeroDivisionError), integrity.hand_over():
        raise ZeroDivisionError
    with pytest.raises(CacheError, match="move to another storage"):
        integrity.require_whole()


def test_a_move_within_a_change_is_part_of_it():
    integrity = Integrity([0])
    with integrity.change("crop"), integrity.hand_over():
        pass
    integrity.require_whole()
