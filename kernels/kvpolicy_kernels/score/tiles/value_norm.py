"""Tile function of the scorer `value_norm`: values with a large p-norm first."""

import triton
import triton.language as tl


@triton.jit
def _power(bases, exponent):
    """Non-negative bases to the power of a positive exponent."""
    zero = bases == 0.0
    return tl.where(zero, 0.0, tl.exp2(exponent * tl.log2(tl.where(zero, 1.0, bases))))


@triton.jit
def value_norm(
    keys,
    values,
    positions,
    newest,
    probabilities,
    voters,
    group,
    attention,
    statistic,
    column,
    length,
    arguments,
    OPTIONS: tl.constexpr,
):
    """[BLOCK]: the p-norm of the values. OPTIONS: p if that is 1 or 2, else 0 and p is arguments[0]."""
    magnitudes = tl.abs(values)
    if OPTIONS[0] == 1:
        norms = tl.sum(magnitudes, 1)
    elif OPTIONS[0] == 2:
        norms = tl.sqrt(tl.sum(values * values, 1))
    else:
        largest = tl.max(magnitudes, 1)
        scale = tl.where((largest > 0.0) & (largest < float("inf")), largest, 1.0)  # so that no power overflows
        norms = scale * _power(tl.sum(_power(magnitudes / scale[:, None], arguments[0]), 1), 1.0 / arguments[0])
    return norms
