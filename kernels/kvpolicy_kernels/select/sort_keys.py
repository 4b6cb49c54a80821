"""Scores as unsigned sort keys for a radix select: higher scores first, NaN last, -0.0 equal to 0.0.

A key has four digits of eight bits.
"""

import triton
import triton.language as tl


@triton.jit
def sort_keys(scores):
    """Uint32 keys in the order of float32 `scores`. NaN has key 1, below that of -inf; no key is 0."""
    bits = scores.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    negative = (bits != magnitude) & (magnitude != 0)
    keys = tl.where(negative, bits ^ 0xFFFFFFFF, magnitude | 0x80000000)
    return tl.where(magnitude > 0x7F800000, 1, keys)


@triton.jit
def digit_of(keys, digit):
    """A digit of uint32 `keys` as int32, 0 to 255; digit 0 is the most significant."""
    return ((keys >> (24 - 8 * digit)) & 0xFF).to(tl.int32)


@triton.jit
def begins_with(keys, prefix, digit):
    """Whether the digits of `keys` above `digit` equal those of `prefix`."""
    return (((keys ^ prefix) >> (24 - 8 * digit)) >> 8) == 0  # in two steps, to avoid a shift by 32 for digit 0


@triton.jit
def next_digit(counts, need, prefix, digit):
    """The next digit of the `need`-th largest of the keys with this `prefix`; `counts` [256] is their histogram.

    Returns the prefix extended by the digit (uint32), the digit (int32), and how many of the keys with the new prefix
    are needed. With `need` 0 the digit is 255.
    """
    at_least = tl.cumsum(counts, 0, reverse=True)  # [256], descending
    value = tl.sum((at_least >= need).to(tl.int32)) - 1
    better = tl.sum(tl.where(tl.arange(0, 256) > value, counts, 0))
    prefix = prefix | (value.to(tl.uint32) << (24 - 8 * digit))
    return prefix, value, need - better
