"""The machine that numbers were made on: versions, cores, the GPU's clocks, free memory."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from kvpolicy.evaluate.environment import machine, version_of, versions

_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "memory.total")


def environment() -> dict[str, Any]:
    """Versions and machine, ready for JSON."""
    with_triton = {**versions(), "triton": version_of("triton")}
    return {"versions": with_triton, "machine": {**machine(), "cores": os.cpu_count(), "gpu": gpu()}}


def gpu() -> dict[str, str] | None:
    """What `nvidia-smi` says of the first GPU; None without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None or not torch.cuda.is_available():
        return None
    command = [tool, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)  # noqa: S603 - found by PATH
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(_FIELDS, values, strict=True)) if len(values) == len(_FIELDS) else None


def free_bytes(device: torch.device) -> int:
    """Bytes that could still be allocated on a device; a very large number where that cannot be read."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    listing = Path("/proc/meminfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    available = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return next(available, 2**62)
