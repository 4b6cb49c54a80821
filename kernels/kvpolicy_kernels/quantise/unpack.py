"""Tile functions that unpack stored formats inside decode attention (see `kv_input.Unpacking`), and rounding."""

import triton
import triton.language as tl


@triton.jit
def rounded(x, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """Float32 to the nearest number of `DTYPE`, no further than its largest; float32 still, if `UPCAST`.

    The interpreter cuts bfloat16 off instead of rounding it: there the lower half is rounded away beforehand.
    """
    if tl.float16 == DTYPE:
        x = tl.where(x < -65504.0, -65504.0, tl.where(x > 65504.0, 65504.0, x))
    if UPCAST:
        if tl.bfloat16 == DTYPE:
            bits = x.to(tl.uint32, bitcast=True)
            even = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(tl.abs(x) <= float("inf"), even.to(tl.float32, bitcast=True), x)  # NaN stays
        elif tl.float16 == DTYPE:
            x = x.to(tl.float16).to(tl.float32)
    else:
        x = x.to(DTYPE)
    return x


@triton.jit
def codes_of(CODES, slots, held, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """Codes [BLOCK, DP] as float32, from ceil(D · BITS / 8) bytes a row, lowest bits first; BITS 2, 4 or 8."""
    WIDTH: tl.constexpr = (D * BITS + 7) // 8
    byte = tl.arange(0, DP * BITS // 8)
    held = held[:, None] & (byte < WIDTH)[None, :]
    found = tl.load(CODES + slots[:, None] * WIDTH + byte[None, :], mask=held, other=0)
    if BITS == 8:
        codes = found
    elif BITS == 4:
        codes = tl.interleave(found & 15, found >> 4)
    else:
        even = tl.interleave(found & 3, (found >> 4) & 3)
        codes = tl.interleave(even, tl.interleave((found >> 2) & 3, found >> 6))
    return codes.to(tl.float32)


@triton.jit
def per_channel(
    COLUMNS,
    slots,
    held,
    head,
    D: tl.constexpr,
    DP: tl.constexpr,
    RUN: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """Code · scale + minimum; scale and minimum [D] a unit. Columns codes, scale, minimum; options (bits, unit)."""
    UNIT: tl.constexpr = OPTIONS[1]
    codes = codes_of(COLUMNS[0], slots, held, D, DP, OPTIONS[0])
    d = tl.arange(0, DP)
    if RUN:
        COUNT: tl.constexpr = slots.shape[0] // UNIT
        units = tl.min(tl.reshape(slots, (COUNT, UNIT)), 1) // UNIT
        there = tl.max(tl.reshape(held.to(tl.int32), (COUNT, UNIT)), 1) > 0
    else:
        units, there = slots // UNIT, held
    place = units[:, None] * D + d[None, :]
    there = there[:, None] & (d < D)[None, :]
    scale = tl.load(COLUMNS[1] + place, mask=there, other=0.0).to(tl.float32)
    minimum = tl.load(COLUMNS[2] + place, mask=there, other=0.0).to(tl.float32)
    if RUN:
        codes = tl.reshape(codes, (COUNT, UNIT, DP))
        vectors = tl.reshape(codes * scale[:, None, :] + minimum[:, None, :], (COUNT * UNIT, DP))
    else:
        vectors = codes * scale + minimum
    return vectors


@triton.jit
def _in_groups(CODES, SCALE, MINIMUM, rows, held, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr,
               GROUP: tl.constexpr):  # fmt: skip
    """Code · scale + minimum [BLOCK, DP]; a scale and a minimum for GROUP channels of a row."""
    GROUPS: tl.constexpr = DP // GROUP
    COUNT: tl.constexpr = rows.shape[0]
    codes = tl.reshape(codes_of(CODES, rows, held, D, DP, BITS), (COUNT, GROUPS, GROUP))
    group = tl.arange(0, GROUPS)
    place = rows[:, None] * (D // GROUP) + group[None, :]
    there = held[:, None] & (group < D // GROUP)[None, :]
    scale = tl.load(SCALE + place, mask=there, other=0.0).to(tl.float32)
    minimum = tl.load(MINIMUM + place, mask=there, other=0.0).to(tl.float32)
    return tl.reshape(codes * scale[:, :, None] + minimum[:, :, None], (COUNT, DP))


@triton.jit
def per_token(COLUMNS, slots, held, head, D: tl.constexpr, DP: tl.constexpr, RUN: tl.constexpr, OPTIONS: tl.constexpr):
    """Code · scale + minimum; scale and minimum for `group` channels. Columns as above; options (bits, group).

    `group` is a power of two that divides D.
    """
    return _in_groups(COLUMNS[0], COLUMNS[1], COLUMNS[2], slots, held, D, DP, OPTIONS[0], OPTIONS[1])


@triton.jit
def centred(COLUMNS, slots, held, head, D: tl.constexpr, DP: tl.constexpr, RUN: tl.constexpr, OPTIONS: tl.constexpr):
    """The mean over the heads less (code · scale + minimum); scale and minimum for `group` channels of a head.

    Columns mean [D], and codes, scale and minimum of all heads; options (bits, group, heads). `group` as above.
    """
    d = tl.arange(0, DP)
    there = held[:, None] & (d < D)[None, :]
    mean = tl.load(COLUMNS[0] + slots[:, None] * D + d[None, :], mask=there, other=0.0).to(tl.float32)
    rows = slots * OPTIONS[2] + head
    return mean - _in_groups(COLUMNS[1], COLUMNS[2], COLUMNS[3], rows, held, D, DP, OPTIONS[0], OPTIONS[1])


@triton.jit
def scaled_fp8(COLUMNS, slots, held, head, D: tl.constexpr, DP: tl.constexpr, RUN: tl.constexpr, OPTIONS: tl.constexpr):
    """Float8 (e4m3) times the largest magnitude of the vector over 448. Columns codes, as bytes, and peak.

    Sign to sign, exponent and mantissa below the top exponent bit of a float16: the number over 256, exactly.
    """
    d = tl.arange(0, DP)
    there = held[:, None] & (d < D)[None, :]
    codes = tl.load(COLUMNS[0] + slots[:, None] * D + d[None, :], mask=there, other=0).to(tl.uint16)
    over_256 = (((codes & 0x80) << 8) | ((codes & 0x7F) << 7)).to(tl.float16, bitcast=True)
    peak = tl.load(COLUMNS[1] + slots, mask=held, other=0.0).to(tl.float32)
    return over_256.to(tl.float32) * (peak * (256 / 448))[:, None]
