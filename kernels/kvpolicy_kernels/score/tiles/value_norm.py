"""Large values first: the tile function of `value_norm`."""

import triton
import triton.language as tl


@triton.jit
def _power(bases, exponent):
    """Bases that are not negative, to the power of a positive exponent."""
    nothing = bases == 0.0
    return tl.where(nothing, 0.0, tl.exp2(exponent * tl.log2(tl.where(nothing, 1.0, bases))))


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
    """[BLOCK], the p-norm; OPTIONS[0] is p for 1 and 2, else 0 and p is arguments[0]."""
    sizes = tl.abs(values)
    if OPTIONS[0] == 1:
        norms = tl.sum(sizes, 1)
    elif OPTIONS[0] == 2:
        norms = tl.sqrt(tl.sum(values * values, 1))
    else:
        largest = tl.max(sizes, 1)
        unit = tl.where((largest > 0.0) & (largest < float("inf")), largest, 1.0)  # no power of it overflows
        norms = unit * _power(tl.sum(_power(sizes / unit[:, None], arguments[0]), 1), 1.0 / arguments[0])
    return norms
