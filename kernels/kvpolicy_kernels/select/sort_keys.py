"""The one order in which scores are compared, as unsigned integers that a radix select can take digit by digit.

Higher first, NaN last, -0.0 equal to 0.0. A digit has eight bits; four of them are a key.
"""

import triton
import triton.language as tl


@triton.jit
def sort_keys(scores):
    """Uint32 keys of float32 `scores` in the same order; those of NaN are 1, below that of -inf, none is 0."""
    bits = scores.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    negative = (bits != magnitude) & (magnitude != 0)
    keys = tl.where(negative, bits ^ 0xFFFFFFFF, magnitude | 0x80000000)
    return tl.where(magnitude > 0x7F800000, 1, keys)


@triton.jit
def digit_of(keys, digit):
    """Int32 value, 0 to 255, of a digit of uint32 `keys`; digit 0 is the highest."""
    return ((keys >> (24 - 8 * digit)) & 0xFF).to(tl.int32)


@triton.jit
def begins_with(keys, prefix, digit):
    """Whether the digits of `keys` before `digit` are those of `prefix`."""
    return (((keys ^ prefix) >> (24 - 8 * digit)) >> 8) == 0  # in two steps: no shift by 32 before the first digit


@triton.jit
def narrow(counts, need, prefix, digit):
    """One digit of the `need`-th best key, of keys that begin with `prefix` and have `counts` [256] by this digit.

    Returns the longer prefix (uint32), the digit (int32), and how many are needed of those that begin so. The digit
    of the best that can be, when none is needed.
    """
    at_least = tl.cumsum(counts, 0, reverse=True)  # [256], non-increasing
    value = tl.sum((at_least >= need).to(tl.int32)) - 1
    better = tl.sum(tl.where(tl.arange(0, 256) > value, counts, 0))
    prefix = prefix | (value.to(tl.uint32) << (24 - 8 * digit))
    return prefix, value, need - better
