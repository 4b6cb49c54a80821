"""Versions and machine that numbers were made with."""

import platform
from importlib import metadata
from pathlib import Path

import torch

_DISTRIBUTIONS = ("kvpolicy", "torch", "transformers", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the distributions that the numbers depend on.

    Of torch the version says which build it is, as in `2.13.0+cpu`; the metadata of some builds leaves that out.
    """
    distributions = {name: version_of(name) for name in _DISTRIBUTIONS}
    return {"python": platform.python_version(), **distributions, "torch": str(torch.__version__)}


def version_of(distribution: str) -> str:
    """Its version, or that it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, str | int]:
    """Processor, threads, and the accelerator if there is one."""
    about: dict[str, str | int] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        about["accelerator"] = torch.cuda.get_device_name()
    return about


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
