"""The table of compiled kernels as a page of the documentation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.compiled_kernels.kernel_table import KernelTable

_HEAD = """# Compiled kernels

Made by `python -m tests.compiled_kernels --write docs/reference/kernels` from the kernels themselves; do not edit. The
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


def page_of(table: KernelTable) -> str:
    """The whole page as Markdown."""
    targets = ", ".join(dict.fromkeys(f"sm_{row['capability']}" for row in table["compiled"]))
    head, method = _HEAD.format(targets=targets, **table["versions"]), _METHOD.format(targets=targets)
    return "\n".join([head, *_rows(table["compiled"]), "", method])


def _rows(compiled: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| build | warps | registers | shared | wide loads | narrow loads | async copies | tensor cores |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in dict.fromkeys(row["name"] for row in compiled):
        own = [row for row in compiled if row["name"] == name]
        columns = ([f"{row['shared'] / 1024:.3g}" for row in own], *(_column(own, key) for key in _COUNTS))
        cells = [_cell(_column(own, "registers")), *map(_cell, columns), _cell([_tensor(row) for row in own])]
        yield f"| {name} | {own[0]['warps']} | {' | '.join(cells)} |"


_COUNTS = ("wide_loads", "narrow_loads", "async_copies")


def _column(own: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return [str(row[key]) for row in own]


def _tensor(row: Mapping[str, Any]) -> str:
    return " + ".join(f"{count} {name}" for name, count in row["tensor_cores"].items()) or "none"


def _cell(parts: Sequence[str]) -> str:
    return parts[0] if len(set(parts)) == 1 else " / ".join(parts)
