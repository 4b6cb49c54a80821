"""What the interpreter cannot see of kernels is read in their source: offsets of 64 bits, and barriers."""

from pathlib import Path

import pytest

import kvpolicy_kernels
from tests.kernels.source_rules import Barriers, kernels_of, narrow_offsets, narrow_tables

FILES = {
    ".".join(file.relative_to(Path(kvpolicy_kernels.__file__).parent).with_suffix("").parts): file.read_text()
    for file in sorted(Path(kvpolicy_kernels.__file__).parent.rglob("*.py"))
}
KERNELS = [kernel for module, source in FILES.items() for kernel in kernels_of(module, source)]
DISJOINT = {"compact.compact_holes._fill_holes"}  # it reads slots beyond the new length and writes slots before it


def changed(module, old, new, count=1):
    """The kernels when a line of one file is another."""
    source = FILES[module]
    assert source.count(old) >= 1
    sources = {**FILES, module: source.replace(old, new, count)}
    return sources[module], [kernel for name, text in sources.items() for kernel in kernels_of(name, text)]


def offsets(kernels):
    return [found for kernel in kernels for found in narrow_offsets(kernel)]


def barriers(kernels):
    rule = Barriers(kernels)
    return [found for kernel in kernels if kernel.name not in DISJOINT for found in rule.missing(kernel)]


def test_kernels_are_found():
    names = {kernel.name for kernel in KERNELS}
    assert {
        "attention.decode_split.decode_split",
        "score.score_kernel.score",
        "compact.compact_ordered._move_slice",
        "compact.compact_holes._fill_holes",
    } <= names
    assert names >= DISJOINT
    assert len(names) > 60


def test_no_offset_is_counted_in_32_bits():
    assert not offsets(KERNELS)
    assert not [found for module, source in FILES.items() for found in narrow_tables(module, source)]


def test_what_moves_in_place_waits_for_all_threads():
    assert not barriers(KERNELS)
    rule = Barriers(KERNELS)
    assert all(list(rule.missing(kernel)) for kernel in KERNELS if kernel.name in DISJOINT)


OFFSETS = [
    ("attention.decode_split", "segment = tl.program_id(0).to(tl.int64)", "segment = tl.program_id(0)"),
    (
        "attention.decode_split",
        "    start = tl.load(STARTS + segment)\n",
        "    start = tl.load(STARTS + segment).to(tl.int32)\n",
    ),
    ("attention.decode_split", "tl.load(STARTS + segment) * D", "tl.load(STARTS + segment).to(tl.int32) * D"),
    (
        "attention.decode_split",
        "partial = segment * tl.num_programs(1) + split",
        "partial = (segment * tl.num_programs(1) + split).to(tl.int32)",
    ),
    ("attention.decode_split", "OUT + segment * (G * DV)", "OUT + segment.to(tl.int32) * (G * DV)"),
    ("attention.decode_split", "QUERIES + segment * (G * D)", "QUERIES + tl.cast(segment * (G * D), tl.int32)"),
    (
        "score.score_kernel",
        "i * tl.num_programs(0).to(tl.int64) + segment) * T",
        "i * tl.num_programs(0) + segment) * T",
    ),
    (
        "score.score_kernel",
        "(i * tl.num_programs(0).to(tl.int64) + segment) * T",
        "(i * tl.num_programs(1) + segment.to(tl.int32)) * T",
    ),
    ("score.score_kernel", "segment = tl.program_id(0).to(tl.int64)", "segment = tl.program_id(0)"),
    ("attention.combine_splits", "segment = tl.program_id(0).to(tl.int64)", "segment = tl.program_id(0)"),
    (
        "attention.combine_splits",
        "partial_row = (segment * splits + split) * G + g",
        "partial_row = (segment * splits + split).to(tl.int32) * G + g",
    ),
    ("common.addressing", "tl.program_id(0).to(tl.int64) // blocks", "tl.program_id(0) // blocks"),
    (
        "compact.compact_to",
        "target = tl.load(TARGET_STARTS + segment)",
        "target = tl.load(TARGET_STARTS + segment).to(tl.int32)",
    ),
]


@pytest.mark.parametrize(("module", "old", "new"), OFFSETS)
def test_an_offset_of_32_bits_is_found(module, old, new):
    assert offsets(changed(module, old, new)[1])


def test_a_table_of_32_bits_is_found():
    source, _ = changed("compact.raw_entries", '"STARTS": "*i64"', '"STARTS": "*i32"')
    assert list(narrow_tables("compact.raw_entries", source))


BARRIERS = [
    ("compact.compact_ordered", "        tl.debug_barrier()\n", ""),
    (
        "compact.compact_ordered",
        "    while first < count:\n        tl.debug_barrier()\n",
        "    tl.debug_barrier()\n    while first < count:\n",
    ),
    ("compact.compact_ordered", "        rows = ahead\n", "        rows = ahead\n        tl.debug_barrier()\n"),
    ("compact.raw_entries", "    tl.debug_barrier()\n", ""),
]


@pytest.mark.parametrize(("module", "old", "new"), BARRIERS)
def test_a_missing_barrier_is_found(module, old, new):
    if "rows = ahead" in old:  # a barrier, but behind the store
        source = FILES[module].replace("        tl.debug_barrier()\n", "").replace(old, new)
        kernels = [kernel for name, text in {**FILES, module: source}.items() for kernel in kernels_of(name, text)]
        assert barriers(kernels)
    else:
        assert barriers(changed(module, old, new)[1])


NEW = """
@triton.jit
def shift(ROWS, STARTS, N, W: tl.constexpr, BLOCK: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    base = ROWS + segment * N
    place = tl.arange(0, BLOCK)
    found = tl.load(base + place + 1, mask=place < N - 1)
    {barrier}
    tl.store(base + place, found, mask=place < N - 1)
"""


def test_a_new_kernel_is_covered():
    for barrier, right in (("tl.debug_barrier()", True), ("pass", False)):
        kernels = kernels_of("new", NEW.replace("{barrier}", barrier))
        assert not offsets(kernels)
        assert bool(barriers(kernels)) != right
    narrow = kernels_of("new", NEW.replace("{barrier}", "pass").replace(".to(tl.int64)", ""))
    assert offsets(narrow)
