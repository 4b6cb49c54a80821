"""Two runs of different shapes compared: where they decide differently, rounding has decided; then both do the same.

The last bits of a product of matrices depend on its shapes. What follows from them without a jump agrees to rounding; a
selection among near ties, or a number between two codes, may fall the other way, and then everything behind it differs.
So a first run is watched, and a second one held to it: whenever it decides from the same numbers, up to `ROUNDING`, it
must decide as the first run did, unless noise of that size lets its own decision fall as the first one's. Then it goes
on with that one, and all later results can be compared as if nothing had happened.

Decisions are found again by what they were made from, not by their place: a row that was given something else, another
row's length among it, finds none, goes its own way, and ends in other results.
"""

import contextlib
from collections import defaultdict
from unittest import mock

from tests.support.deciding import places
from tests.support.rounding import ROUNDING


class Decisions:
    """Those of a first run, for others to repeat."""

    def __init__(self, rounding=ROUNDING):
        self.rounding = rounding
        self.known = defaultdict(list)
        self.repeated, self.disputed = 0, 0  # decisions found again; those of them that hung on rounding

    def watched(self):
        """Note what is decided inside the block."""
        return self._patched(self._note)

    def followed(self):
        """Hold to it what is decided inside the block."""
        return self._patched(self._follow)

    def _note(self, kind, decision):
        self.known[kind].append(decision)
        return decision

    def _follow(self, kind, own):
        pairs = (own.beside(theirs) for theirs in reversed(self.known[kind]))
        found = next((pair for pair in pairs if pair[0].same_question(pair[1], self.rounding)), None)
        if found is None:
            return own
        own, theirs = found
        self.repeated += 1
        if own.same_answer(theirs, self.rounding):
            return own
        self.disputed += 1
        tie = own.hangs_on_rounding(theirs, self.rounding)
        assert tie, f"{kind[0]}: decided otherwise, by more than rounding"
        return theirs

    @contextlib.contextmanager
    def _patched(self, settle):
        with contextlib.ExitStack() as stack:
            for target, name, wrapped in places(settle):
                stack.enter_context(mock.patch.object(target, name, wrapped))
            yield self
