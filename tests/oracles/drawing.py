"""Gaussian numbers as hashes of what they are for, by Python's integers."""

import math

import numpy as np


def gaussians(seed: int, layer: int, newest: int, rows: int, columns: int) -> np.ndarray:
    """[rows, columns], standard normal, by Box and Muller's method from two hashes each."""
    return np.array([[_gaussian(seed, layer, newest, r * columns + c) for c in range(columns)] for r in range(rows)])


def _gaussian(*words: int) -> float:
    radius, angle = (_uniform(*words, which) for which in (0, 1))
    return math.sqrt(-2 * math.log(1 - radius)) * math.cos(2 * math.pi * angle)


def _uniform(*words: int) -> float:
    hashed = 0
    for word in words:
        hashed ^= word
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            hashed = ((hashed ^ (hashed >> shift)) * factor) % 2**32
        hashed ^= hashed >> 16
    return (hashed >> 8) / 2**24
