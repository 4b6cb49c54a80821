"""Numbers that are drawn for an entry, by a hash in Python's own integers."""

_WORD = 2**32


def hashed(*words: int) -> int:
    """A hash of 32 bits of some words: each is added by exclusive or, then all is mixed (Ellis' lowbias32)."""
    state = 0
    for word in words:
        state ^= word % _WORD
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            state = ((state ^ (state >> shift)) * factor) % _WORD
        state ^= state >> 16
    return state
