"""Tile functions for the tests of the conformance suite: right and wrong."""

import triton
import triton.language as tl


@triton.jit
def squared(
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
    """Right, with the first argument as factor."""
    return tl.sum(keys * keys, 1) * arguments[0]


@triton.jit
def wrong_sign(
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
    """Keeps what should go."""
    return -tl.sum(keys * keys, 1) * arguments[0]


@triton.jit
def unscaled(
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
    """Forgets its argument."""
    return tl.sum(keys * keys, 1)


@triton.jit
def of_values(
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
    """Reads values, which it may have asked for or not."""
    return tl.sum(values * values, 1) * arguments[0]


@triton.jit
def counts_from_newest(
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
    """The age, taken for the distance from the newest position: right where nothing is ragged or evicted."""
    return (positions - newest).to(tl.float32) * arguments[0]


@triton.jit
def over_tile(
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
    """Relative to the largest of the tile, taken for the largest of the head."""
    norms = tl.sum(keys * keys, 1)
    return norms / tl.max(norms, 0)


@triton.jit
def from_column(
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
    """What was computed beforehand."""
    return column


@triton.jit
def nan(
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
    """No number."""
    return tl.sum(keys * keys, 1) * float("nan")


@triton.jit
def of_votes(
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
    """Probabilities of all queries that there are."""
    return tl.sum(tl.sum(probabilities, 2), 1)
