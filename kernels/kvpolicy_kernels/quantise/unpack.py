"""Tile functions that unpack stored formats inside decode attention (see `kv_input.Unpacking`), and rounding."""

import triton
import triton.language as tl


@triton.jit
def round_to(x, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """Float32 rounded to DTYPE, half to even; float16 is clamped to its range. The result stays float32 if UPCAST.

    UPCAST is for the interpreter, which truncates float32 to bfloat16 instead of rounding: it is rounded here.
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
def load_codes(CODES, slots, mask, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """Load codes [BLOCK, DP] from rows of ceil(D · BITS / 8) bytes, lowest bits first; BITS 1, 2, 3, 4 or 8."""
    WIDTH: tl.constexpr = (D * BITS + 7) // 8
    if BITS == 1 or BITS == 3:  # noqa: PLR1714 Triton knows no sets
        word = _load_words(CODES, slots, mask, WIDTH, DP, BITS)
        even = tl.interleave(_every_fourth(word, 0, BITS), _every_fourth(word, 2, BITS))
        codes = tl.interleave(even, tl.interleave(_every_fourth(word, 1, BITS), _every_fourth(word, 3, BITS)))
    else:
        byte = tl.arange(0, DP * BITS // 8)
        byte_mask = mask[:, None] & (byte < WIDTH)[None, :]
        packed = tl.load(CODES + slots[:, None] * WIDTH + byte[None, :], mask=byte_mask, other=0)
        if BITS == 8:
            codes = packed
        elif BITS == 4:
            codes = tl.interleave(packed & 15, packed >> 4)
        else:
            even = tl.interleave(packed & 3, (packed >> 4) & 3)
            codes = tl.interleave(even, tl.interleave((packed >> 2) & 3, packed >> 6))
    return codes


@triton.jit
def _load_words(CODES, slots, mask, WIDTH: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """The BITS bytes of every eight codes as one int32, [BLOCK, DP / 8]."""
    first = tl.arange(0, DP // 8) * BITS
    word = tl.zeros((slots.shape[0], DP // 8), tl.int32)
    for i in tl.static_range(BITS):
        byte_mask = mask[:, None] & (first + i < WIDTH)[None, :]
        packed = tl.load(CODES + slots[:, None] * WIDTH + (first + i)[None, :], mask=byte_mask, other=0)
        word = word | (packed.to(tl.int32) << (8 * i))
    return word


@triton.jit
def _every_fourth(word, FIRST: tl.constexpr, BITS: tl.constexpr):
    """Codes FIRST and FIRST + 4 of every word of eight, [BLOCK, DP / 4]."""
    low, high = word >> (FIRST * BITS), word >> ((FIRST + 4) * BITS)
    return tl.interleave(low & (2**BITS - 1), high & (2**BITS - 1))


@triton.jit
def per_channel(
    COLUMNS,
    slots,
    mask,
    head,
    D: tl.constexpr,
    DP: tl.constexpr,
    RUN: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """Code · scale + minimum, with scales and minima [D] per group of tokens.

    Columns: codes, scale, minimum. Options: bits, group size.
    """
    GROUP_SIZE: tl.constexpr = OPTIONS[1]
    codes = load_codes(COLUMNS[0], slots, mask, D, DP, OPTIONS[0]).to(tl.float32)
    d = tl.arange(0, DP)
    if RUN:
        COUNT: tl.constexpr = slots.shape[0] // GROUP_SIZE
        groups = tl.min(tl.reshape(slots, (COUNT, GROUP_SIZE)), 1) // GROUP_SIZE
        group_mask = tl.max(tl.reshape(mask.to(tl.int32), (COUNT, GROUP_SIZE)), 1) > 0
    else:
        groups, group_mask = slots // GROUP_SIZE, mask
    offsets = groups[:, None] * D + d[None, :]
    element_mask = group_mask[:, None] & (d < D)[None, :]
    scale = tl.load(COLUMNS[1] + offsets, mask=element_mask, other=0.0).to(tl.float32)
    minimum = tl.load(COLUMNS[2] + offsets, mask=element_mask, other=0.0).to(tl.float32)
    if RUN:
        codes = tl.reshape(codes, (COUNT, GROUP_SIZE, DP))
        vectors = tl.reshape(codes * scale[:, None, :] + minimum[:, None, :], (COUNT * GROUP_SIZE, DP))
    else:
        vectors = codes * scale + minimum
    return vectors


@triton.jit
def _in_groups(CODES, SCALE, MINIMUM, rows, mask, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr,
               GROUP: tl.constexpr):  # fmt: skip
    """Code · scale + minimum [BLOCK, DP], with a scale and a minimum per GROUP channels of a row."""
    GROUPS: tl.constexpr = DP // GROUP
    COUNT: tl.constexpr = rows.shape[0]
    codes = tl.reshape(load_codes(CODES, rows, mask, D, DP, BITS).to(tl.float32), (COUNT, GROUPS, GROUP))
    group = tl.arange(0, GROUPS)
    offsets = rows[:, None] * (D // GROUP) + group[None, :]
    element_mask = mask[:, None] & (group < D // GROUP)[None, :]
    scale = tl.load(SCALE + offsets, mask=element_mask, other=0.0).to(tl.float32)
    minimum = tl.load(MINIMUM + offsets, mask=element_mask, other=0.0).to(tl.float32)
    return tl.reshape(codes * scale[:, :, None] + minimum[:, :, None], (COUNT, DP))


@triton.jit
def per_token(COLUMNS, slots, mask, head, D: tl.constexpr, DP: tl.constexpr, RUN: tl.constexpr, OPTIONS: tl.constexpr):
    """Code · scale + minimum, with a scale and a minimum per `group` channels of a token.

    Columns: codes, scale, minimum. Options: bits, group; `group` is a power of two that divides D.
    """
    return _in_groups(COLUMNS[0], COLUMNS[1], COLUMNS[2], slots, mask, D, DP, OPTIONS[0], OPTIONS[1])


@triton.jit
def centred(COLUMNS, slots, mask, head, D: tl.constexpr, DP: tl.constexpr, RUN: tl.constexpr, OPTIONS: tl.constexpr):
    """Mean over the heads minus (code · scale + minimum), with a scale and a minimum per `group` channels of a head.

    Columns: mean [D], then codes, scale and minimum of all heads. Options: bits, group (see `per_token`), heads.
    """
    d = tl.arange(0, DP)
    element_mask = mask[:, None] & (d < D)[None, :]
    mean = tl.load(COLUMNS[0] + slots[:, None] * D + d[None, :], mask=element_mask, other=0.0).to(tl.float32)
    rows = slots * OPTIONS[2] + head
    return mean - _in_groups(COLUMNS[1], COLUMNS[2], COLUMNS[3], rows, mask, D, DP, OPTIONS[0], OPTIONS[1])


@triton.jit
def per_vector(COLUMNS, slots, mask, head, D: tl.constexpr, DP: tl.constexpr, RUN: tl.constexpr, OPTIONS: tl.constexpr):
    """Code · scale + minimum, with a scale and a minimum per vector. Columns: codes, scale, minimum. Options: bits."""
    codes = load_codes(COLUMNS[0], slots, mask, D, DP, OPTIONS[0]).to(tl.float32)
    scale = tl.load(COLUMNS[1] + slots, mask=mask, other=0.0).to(tl.float32)
    minimum = tl.load(COLUMNS[2] + slots, mask=mask, other=0.0).to(tl.float32)
    vectors = codes * scale[:, None] + minimum[:, None]
    return tl.where((tl.arange(0, DP) < D)[None, :], vectors, 0.0)


@triton.jit
def codebook(COLUMNS, slots, mask, head, D: tl.constexpr, DP: tl.constexpr, RUN: tl.constexpr, OPTIONS: tl.constexpr):
    """Level of each code · norm of the vector / √D, in the basis that was quantised; see `Unpacking.in_basis`.

    Columns: codes, norm. Options: bits, then the 2^bits levels.
    """
    BITS: tl.constexpr = OPTIONS[0]
    codes = load_codes(COLUMNS[0], slots, mask, D, DP, BITS)
    levels = OPTIONS[1:]
    for bit in tl.static_range(BITS):  # halves the candidates: those with this bit of the code, or those without
        is_set = ((codes >> bit) & 1) != 0
        left = ()
        for i in tl.static_range(len(levels) // 2):
            left = left + (tl.where(is_set, levels[2 * i + 1], levels[2 * i]),)  # type: ignore[assignment]
        levels = left
    vectors = tl.where((tl.arange(0, DP) < D)[None, :], levels[0], 0.0)
    norm = tl.load(COLUMNS[1] + slots, mask=mask, other=0.0).to(tl.float32)
    return vectors * (norm * (D**-0.5))[:, None]


@triton.jit
def scaled_fp8(COLUMNS, slots, mask, head, D: tl.constexpr, DP: tl.constexpr, RUN: tl.constexpr, OPTIONS: tl.constexpr):
    """Float8 (e4m3) · largest magnitude of the vector / 448. Columns: codes as bytes, largest magnitude."""
    magnitude = tl.load(COLUMNS[1] + slots, mask=mask, other=0.0).to(tl.float32)
    return _fp8_over_256(COLUMNS[0], slots, mask, D, DP) * (magnitude * (256 / 448))[:, None]


@triton.jit
def fp8(COLUMNS, slots, mask, head, D: tl.constexpr, DP: tl.constexpr, RUN: tl.constexpr, OPTIONS: tl.constexpr):
    """Float8 (e4m3) without a scale. Columns: codes as bytes."""
    return _fp8_over_256(COLUMNS[0], slots, mask, D, DP) * 256.0


@triton.jit
def _fp8_over_256(CODES, slots, mask, D: tl.constexpr, DP: tl.constexpr):
    """Float8 (e4m3) numbers / 256 in float32, exactly.

    With exponent and mantissa shifted to where a float16 has them, the bits of an e4m3 number are the number / 256.
    """
    d = tl.arange(0, DP)
    element_mask = mask[:, None] & (d < D)[None, :]
    codes = tl.load(CODES + slots[:, None] * D + d[None, :], mask=element_mask, other=0).to(tl.uint16)
    over_256 = (((codes & 0x80) << 8) | ((codes & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return over_256.to(tl.float32)
