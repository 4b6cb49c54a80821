"""The largest batch that fits."""

from collections.abc import Callable

_FINE = 16  # a batch is found to one part in so many


def largest(fits: Callable[[int], bool], most: int, expired: Callable[[], bool] = lambda: False) -> int:
    """The largest number up to `most` that fits, 0 if not even 1 does: doubled until one does not, then bisected.

    What is larger fits no better. Once `expired` says so, the best that is known is the answer.
    """
    good, bad = 0, most + 1
    while bad - good > max(1, good // _FINE) and not (good and expired()):
        tried = max(1, 2 * good) if bad > most else (good + bad) // 2
        tried = min(tried, most)
        if fits(tried):
            good = tried
        else:
            bad = tried
    return good
