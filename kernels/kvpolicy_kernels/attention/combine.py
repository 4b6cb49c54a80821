"""What the programs of split attention found, put together; and the attention that every slot received."""

import triton
import triton.language as tl

from kvpolicy_kernels.quantise.unpack import rounded

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["listed", "pitch", "item", "splits"])
def combine(
    PEAKS,  # [P, splits, G] in log2 units
    SUMS,  # [P, splits, G]
    PARTIAL,  # [P, splits, G, DV], or None: the output is there already
    OUT,  # [P, G, DV]
    LENGTHS,  # [P]
    STARTS,  # [P], of what a slot carries
    SLOTS,  # [P, listed]
    LOGITS,  # [P, G, pitch]
    VOTES,  # addresses [L], as MASS
    MASS,  # [slots, G] float32, to which the attention of this query is added
    listed,
    pitch,
    item,
    splits,
    DTYPE: tl.constexpr,
    PER_LAYER: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    SPLITS: tl.constexpr,  # rounded up to a power of two
    BLOCK: tl.constexpr,  # slots that one program gives their mass
    UPCAST: tl.constexpr,
):
    """Grid (P, G + blocks of slots): a program for each query head's output, and one for each block of slots.

    Without PARTIAL there are none of the first kind, without MASS none of the second.
    """
    segment = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1)
    length = tl.load(LENGTHS + segment) if SLOTS is None else listed
    used = tl.cdiv(length, item)
    block = place
    if PARTIAL is not None:
        block = place - G
        if place < G:
            _output(PEAKS, SUMS, PARTIAL, OUT, segment, place, used, splits, DTYPE, G, DV, DVP, SPLITS, UPCAST)
    if MASS is not None:  # noqa: SIM102 Triton decides this when it compiles, and the others when it runs
        if block >= 0:  # noqa: SIM102
            if block * BLOCK < length:
                _mass(
                    PEAKS, SUMS, STARTS, SLOTS, LOGITS, VOTES, MASS, segment, block, used, length, listed, pitch,
                    splits, PER_LAYER, G, GP, SPLITS, BLOCK,
                )  # fmt: skip


@triton.jit
def _output(
    PEAKS, SUMS, PARTIAL, OUT, segment, g, used, splits,
    DTYPE: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The attention of one query head: zeros where it saw nothing."""
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, DVP)
    found = split < used
    place = (segment * splits + split) * G + g
    peaks = tl.load(PEAKS + place, mask=found, other=float("-inf"))
    sums = tl.load(SUMS + place, mask=found, other=0.0)
    mask = found[:, None] & (d < DV)[None, :]
    partial = tl.load(PARTIAL + place[:, None] * DV + d[None, :], mask=mask, other=0.0)
    peak = tl.max(peaks, 0)
    weights = tl.exp2(peaks - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weights * sums, 0)
    summed = tl.sum(weights[:, None] * partial, 0)
    result = summed / tl.where(total == 0.0, 1.0, total)
    tl.store(OUT + (segment * G + g) * DV + d, rounded(result, DTYPE, UPCAST), mask=d < DV)


@triton.jit
def _mass(
    PEAKS, SUMS, STARTS, SLOTS, LOGITS, VOTES, MASS, segment, block, used, length, listed, pitch, splits,
    PER_LAYER: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The probabilities of one block of slots, from their logits and the sums over all of them."""
    g = tl.arange(0, GP)
    split = tl.arange(0, SPLITS)
    found = (split < used)[None, :] & (g < G)[:, None]
    at = (segment * splits + split[None, :]) * G + g[:, None]
    peaks = tl.load(PEAKS + at, mask=found, other=float("-inf"))
    sums = tl.load(SUMS + at, mask=found, other=0.0)
    peak = tl.max(peaks, 1)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(peaks - safe[:, None]) * sums, 1)
    place = block * BLOCK + tl.arange(0, BLOCK)
    there = place < length
    slots = place
    if SLOTS is not None:
        slots = tl.load(SLOTS + segment * listed + place, mask=there, other=-1).to(tl.int32)
        there = there & (slots >= 0)
    mine = there[:, None] & (g < G)[None, :]
    logits = tl.load(LOGITS + segment * G * pitch + g[None, :] * pitch + place[:, None], mask=mine, other=float("-inf"))
    start = tl.load(STARTS + segment)
    if VOTES is not None:
        votes = tl.load(VOTES + segment // PER_LAYER).to(tl.pointer_type(tl.float32))
        logits += tl.load(votes + start + slots, mask=there, other=0.0)[:, None]
    mass = tl.exp2(logits * _LOG2E - safe[None, :]) / tl.where(total == 0.0, 1.0, total)[None, :]
    # A query whose attention is NaN counts for nothing; an entry that alone is NaN has NaN, which is not itself.
    mass = tl.where(mass == mass, mass, 0.0)  # noqa: PLR0124
    mass = tl.where((logits != logits) & (peak > float("-inf"))[None, :], float("nan"), mass)  # noqa: PLR0124
    into = tl.load(MASS + segment // PER_LAYER).to(tl.pointer_type(tl.float32)) + start * G
    into = into + slots[:, None] * G + g[None, :]
    tl.store(into, tl.load(into, mask=mine, other=0.0) + mass, mask=mine)
