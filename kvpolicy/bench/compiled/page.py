"""A record of compiled kernels as a page of the documentation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

_HEAD = """# Compiled kernels

Made by `python -m kvpolicy.bench.compiled --write docs/reference/kernels` from the kernels themselves; do not edit. The
same numbers stand in [kernels.json](kernels.json). No GPU was needed: Triton {triton} compiled every kernel, with the
types, block sizes and alignments of real launches, for {targets}.
"""
_METHOD = """## What is checked

The tests compile all of this again and fail when, on any target,

- a kernel does not compile;
- the assembler gave it a stack: that is where spilt registers go;
- it needs more shared memory than a program may have (163 KiB on sm_80, 227 KiB on sm_90 and sm_100);
- a kernel that reads rows of keys or values has no load of 16 bytes a thread any more, or one that multiplies matrices
  has no tensor-core instruction;
- with the version of Triton that this page was made with, any number differs from the one recorded here.

After a change that is meant, run the command again and look at what moved.

## How to read it

One row a build: a kernel with the types and constants of one launch; `score NAME` is the fused score kernel of the
policies NAME. A cell with three numbers gives those of {targets}; with one, all targets have the same. Instructions are
counted in the code, not as they are executed: what stands in a loop counts once.

- **registers**: a thread; **shared**: KiB a program.
- **wide loads**: loads from global memory of at least 16 bytes a thread, asynchronous copies included;
  **narrow loads**: the others (lengths, addresses, scores and positions are read that way, and none of them is large).
- **async copies**: copies from global to shared memory that run ahead of the arithmetic.
- **tensor cores**: `wgmma` on sm_90, `tcgen05` on sm_100, `mma.sync` where a tile is too small for these, and on sm_80.
"""


def page_of(record: Record) -> str:
    """The whole page as Markdown."""
    capabilities = list(dict.fromkeys(one["capability"] for one in record["compiled"]))
    targets = ", ".join(f"sm_{one}" for one in capabilities)
    table = "\n".join(_table(record["compiled"]))
    return "\n".join([_HEAD.format(targets=targets, **record["versions"]), table, "", _METHOD.format(targets=targets)])


def _table(compiled: Sequence[Record]) -> Iterator[str]:
    yield "| build | warps | registers | shared | wide loads | narrow loads | async copies | tensor cores |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in dict.fromkeys(one["name"] for one in compiled):
        own = [one for one in compiled if one["name"] == name]
        columns = ([f"{one['shared'] / 1024:.3g}" for one in own], *(_column(own, key) for key in _COUNTS))
        cells = [_cell(_column(own, "registers")), *map(_cell, columns), _cell([_tensor(one) for one in own])]
        yield f"| {name} | {own[0]['warps']} | {' | '.join(cells)} |"


_COUNTS = ("wide_loads", "narrow_loads", "async_copies")


def _column(own: Sequence[Record], key: str) -> list[str]:
    return [str(one[key]) for one in own]


def _tensor(one: Record) -> str:
    return " + ".join(f"{count} {name}" for name, count in one["tensor_cores"].items()) or "none"


def _cell(parts: Sequence[str]) -> str:
    return parts[0] if len(set(parts)) == 1 else " / ".join(parts)
