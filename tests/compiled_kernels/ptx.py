"""Counts the instructions that decide whether a kernel is fast, in its PTX."""

import re

import attrs

_LOAD = re.compile(r"\bld\.global(?P<qualifiers>[\w.:]*)")
_COPY = re.compile(
    r"\bcp\.async\.c[ag]\.shared\.global[^;]*?,\s*(?P<bytes>0x[0-9a-fA-F]+|\d+)"
)  # bytes: the third operand
_VECTOR = re.compile(r"\.v(\d)(?=\.)")
_BITS = re.compile(r"\.[bsuf](\d+)$")
_WIDE = 16  # bytes
_TENSOR = {"wgmma": r"\bwgmma\.mma_async", "mma.sync": r"\bmma\.sync", "tcgen05": r"\btcgen05\.mma"}


@attrs.frozen
class Instructions:
    """How often each kind of instruction stands in a kernel; loops are counted once."""

    wide_loads: int  # from global memory, at least 16 bytes a thread, asynchronous copies included
    narrow_loads: int  # the others
    async_copies: int  # global to shared memory, whatever their width: what software pipelining is made of
    tensor_cores: dict[str, int]  # wgmma (sm_90), mma.sync, tcgen05 (sm_100); kinds that do not occur are left out


def instructions_of(ptx: str) -> Instructions:
    """Count in the PTX of one kernel."""
    copies = [int(match["bytes"], 0) for match in _COPY.finditer(ptx)]
    widths = [_width(match["qualifiers"]) for match in _LOAD.finditer(ptx)] + copies
    wide = sum(width >= _WIDE for width in widths)
    tensor = {name: len(re.findall(pattern, ptx)) for name, pattern in _TENSOR.items()}
    return Instructions(wide, len(widths) - wide, len(copies), {name: count for name, count in tensor.items() if count})


def _width(qualifiers: str) -> int:
    """Bytes that `ld.global` with these qualifiers loads: `.L1::evict_last.v4.b32` are 16."""
    vector, bits = _VECTOR.search(qualifiers), _BITS.search(qualifiers)
    return (int(vector[1]) if vector else 1) * (int(bits[1]) if bits else 8) // 8
