"""Whether kernels can run on a device, and the error with which launchers refuse inputs."""

import importlib.util
import os

import torch


class UnsupportedInputError(Exception):
    """A launcher does not support these inputs. Nothing was written; the caller runs the torch reference instead."""


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels on NumPy arrays; set in the environment when Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def unavailable_reason(device: torch.device) -> str:
    """Why kernels cannot run on `device`; empty when they can. Does not consider the interpreter, which tests use."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return "" if device.type == "cuda" else f"no Triton on {device.type}"


def require(condition: bool, message: str) -> None:
    """Raise UnsupportedInputError with `message` unless the condition holds."""
    if not condition:
        raise UnsupportedInputError(message)
