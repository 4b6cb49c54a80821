"""Whether kernels can run at all, and how they say that they cannot."""

import importlib.util
import os

import torch


class UnsupportedInputError(Exception):
    """A launcher's guard refuses these tensors, before anything was written; the caller runs its reference instead."""


def interpreting() -> bool:
    """Whether kernels run on NumPy instead of a GPU: for tests. Decided by the environment when Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def obstacle(device: torch.device) -> str:
    """Why no kernel runs on `device`; empty when kernels do. The interpreter is for tests, and asked for by name."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return "" if device.type == "cuda" else f"no Triton on {device.type}"


def require(condition: bool, message: str) -> None:
    """Raise UnsupportedInputError with `message` unless the condition holds."""
    if not condition:
        raise UnsupportedInputError(message)
