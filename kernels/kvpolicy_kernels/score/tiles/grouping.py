"""Device functions that reduce over the query heads of a KV head."""

import triton
import triton.language as tl

HOW = {"mean": 0, "max": 1, "sum": 2}  # encoding in the OPTIONS of tile functions


@triton.jit
def nan_max(values, AXIS: tl.constexpr):
    """Maximum that is NaN if any value is NaN; `tl.max` ignores NaN."""
    has_nan = tl.max((values != values).to(tl.int32), AXIS)  # noqa: PLR0124 only NaN differs from itself
    return tl.where(has_nan > 0, float("nan"), tl.max(values, AXIS))


@triton.jit
def reduce_group(values, group, AXIS: tl.constexpr, HOW: tl.constexpr):
    """Mean, maximum or sum over the query heads along AXIS; padding is zeros and values are not negative."""
    if HOW == 1:
        reduced = nan_max(values, AXIS)
    else:
        reduced = tl.sum(values, AXIS)
        if HOW == 0:
            reduced = reduced / group
    return reduced
