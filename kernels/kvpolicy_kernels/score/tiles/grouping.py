"""Reductions over the query heads of a KV head, inside kernels."""

import triton
import triton.language as tl

HOW = {"mean": 0, "max": 1, "sum": 2}  # as tile functions are told in OPTIONS


@triton.jit
def largest(values, AXIS: tl.constexpr):
    """The maximum, NaN where any value is NaN; `tl.max` alone would lose it."""
    wrong = tl.max((values != values).to(tl.int32), AXIS)  # noqa: PLR0124 only NaN differs from itself
    return tl.where(wrong > 0, float("nan"), tl.max(values, AXIS))


@triton.jit
def over_group(values, group, AXIS: tl.constexpr, HOW: tl.constexpr):
    """Mean, maximum or sum over the query heads along `AXIS`; what pads them is zeros, and no value is negative."""
    if HOW == 1:
        reduced = largest(values, AXIS)
    else:
        reduced = tl.sum(values, AXIS)
        if HOW == 0:
            reduced = reduced / group
    return reduced
