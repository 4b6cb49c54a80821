"""Numbers that are drawn for an entry, as hashes of what they are for, by Python's own integers."""

import math

import numpy as np

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


def gaussians(seed: int, layer: int, newest: int, rows: int, columns: int) -> np.ndarray:
    """[rows, columns], standard normal, by Box and Muller's method from two hashes each."""
    return np.array([[_gaussian(seed, layer, newest, r * columns + c) for c in range(columns)] for r in range(rows)])


def _gaussian(*words: int) -> float:
    radius, angle = ((hashed(*words, which) >> 8) / 2**24 for which in (0, 1))
    return math.sqrt(-2 * math.log(1 - radius)) * math.cos(2 * math.pi * angle)
