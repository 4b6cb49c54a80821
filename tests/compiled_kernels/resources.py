"""What the assembler gave a kernel, read from its machine code by the `cuobjdump` of the Triton wheel."""

import re
import subprocess
import tempfile
from pathlib import Path

import attrs

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


@attrs.frozen
class Resources:
    """Of the hungriest function in a cubin."""

    registers: int  # per thread
    stack: int  # bytes per thread; whatever is spilt lies there


def resources_of(cubin: bytes) -> Resources:
    """Read the resource usage of a cubin.

    Raises:
        OSError: `cuobjdump` cannot be run.
        ValueError: it said something else than expected.
    """
    from triton import knobs  # noqa: PLC0415 - kvpolicy works without Triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the wheel's own tool
    usages = [tuple(map(int, pair)) for pair in _USAGE.findall(answer.stdout)]
    if not usages:
        raise ValueError(f"cuobjdump: {answer.stdout} {answer.stderr}")
    return Resources(max(registers for registers, _ in usages), max(stack for _, stack in usages))
