"""Merges the partial results of `decode_split` into the output, and adds the attention mass of every slot."""

import triton
import triton.language as tl

from kvpolicy_kernels.common.addressing import column_pointer
from kvpolicy_kernels.quantise.unpack import round_to

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["listed", "pitch", "split_size", "splits"])
def combine_splits(
    MAXIMA,  # [P, splits, G] in log2 units
    SUMS,  # [P, splits, G]
    PARTIAL,  # [P, splits, G, DV], or None: the output is complete already
    OUT,  # [P, G, DV]
    LENGTHS,  # [P]
    STARTS,  # [P], of votes and mass
    SLOTS,  # [P, listed]
    LOGITS,  # [P, G, pitch]
    VOTES,  # addresses [L]
    MASS,  # addresses [L] of [slots, G] float32, to which the attention of this query is added
    listed,
    pitch,
    split_size,
    splits,
    DTYPE: tl.constexpr,
    PER_LAYER: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    SPLITS: tl.constexpr,  # rounded up to a power of two
    BLOCK: tl.constexpr,  # slots per program that adds mass
    UPCAST: tl.constexpr,
):
    """Grid (P, G + blocks of slots): one program per query head for the output, one per block of slots for the mass.

    Without PARTIAL the former are left out, without MASS the latter.
    """
    segment = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    length = tl.load(LENGTHS + segment) if SLOTS is None else listed
    used_splits = tl.cdiv(length, split_size)
    block = program
    if PARTIAL is not None:
        block = program - G
        if program < G:
            _output(
                MAXIMA, SUMS, PARTIAL, OUT, segment, program, used_splits, splits, DTYPE, G, DV, DVP, SPLITS, UPCAST
            )
    if MASS is not None:  # noqa: SIM102 Triton decides this when it compiles, and the others when it runs
        if block >= 0:  # noqa: SIM102
            if block * BLOCK < length:
                _mass(
                    MAXIMA, SUMS, STARTS, SLOTS, LOGITS, VOTES, MASS, segment, block, used_splits, length, listed,
                    pitch, splits, PER_LAYER, G, GP, SPLITS, BLOCK,
                )  # fmt: skip


@triton.jit
def _output(
    MAXIMA, SUMS, PARTIAL, OUT, segment, g, used_splits, splits,
    DTYPE: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The output of one query head `g`; zeros if it sees nothing."""
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, DVP)
    valid = split < used_splits
    partial_row = (segment * splits + split) * G + g
    maxima = tl.load(MAXIMA + partial_row, mask=valid, other=float("-inf"))
    sums = tl.load(SUMS + partial_row, mask=valid, other=0.0)
    mask = valid[:, None] & (d < DV)[None, :]
    partial = tl.load(PARTIAL + partial_row[:, None] * DV + d[None, :], mask=mask, other=0.0)
    maximum = tl.max(maxima, 0)
    weights = tl.exp2(maxima - tl.where(maximum == float("-inf"), 0.0, maximum))
    total = tl.sum(weights * sums, 0)
    weighted = tl.sum(weights[:, None] * partial, 0)
    result = weighted / tl.where(total == 0.0, 1.0, total)
    tl.store(OUT + (segment * G + g) * DV + d, round_to(result, DTYPE, UPCAST), mask=d < DV)


@triton.jit
def _mass(
    MAXIMA, SUMS, STARTS, SLOTS, LOGITS, VOTES, MASS, segment, block, used_splits, length, listed, pitch, splits,
    PER_LAYER: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the attention probabilities of one block of slots to MASS, from their logits and the softmax sums."""
    g = tl.arange(0, GP)
    split = tl.arange(0, SPLITS)
    partial_mask = (split < used_splits)[None, :] & (g < G)[:, None]
    partial_row = (segment * splits + split[None, :]) * G + g[:, None]
    maxima = tl.load(MAXIMA + partial_row, mask=partial_mask, other=float("-inf"))
    sums = tl.load(SUMS + partial_row, mask=partial_mask, other=0.0)
    maximum = tl.max(maxima, 1)
    safe = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.exp2(maxima - safe[:, None]) * sums, 1)
    index = block * BLOCK + tl.arange(0, BLOCK)
    valid = index < length
    slots = index
    if SLOTS is not None:
        slots = tl.load(SLOTS + segment * listed + index, mask=valid, other=-1).to(tl.int32)
        valid = valid & (slots >= 0)
    mask = valid[:, None] & (g < G)[None, :]
    logits = tl.load(LOGITS + segment * G * pitch + g[None, :] * pitch + index[:, None], mask=mask, other=float("-inf"))
    start = tl.load(STARTS + segment)
    if VOTES is not None:
        votes = column_pointer(VOTES, segment // PER_LAYER, tl.float32)
        logits += tl.load(votes + start + slots, mask=valid, other=0.0)[:, None]
    mass = tl.exp2(logits * _LOG2E - safe[None, :]) / tl.where(total == 0.0, 1.0, total)[None, :]
    # A query with NaN attention adds nothing, except NaN to the entries whose own logit is NaN. NaN != NaN.
    mass = tl.where(mass == mass, mass, 0.0)  # noqa: PLR0124
    mass = tl.where((logits != logits) & (maximum > float("-inf"))[None, :], float("nan"), mass)  # noqa: PLR0124
    mass_pointers = column_pointer(MASS, segment // PER_LAYER, tl.float32) + start * G
    mass_pointers = mass_pointers + slots[:, None] * G + g[None, :]
    tl.store(mass_pointers, tl.load(mass_pointers, mask=mask, other=0.0) + mass, mask=mask)
