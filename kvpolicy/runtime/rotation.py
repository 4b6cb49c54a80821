"""The rotary embedding of a live model, as something that can be undone."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpolicy.stages import Rotary

_FIXED = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length
_FULL = "full_attention"  # the layers that a policy manages, where kinds of layers have their own rotation
_SOME_POSITIONS = (0, 1, 7, 1000)


def rotary_of(model: PreTrainedModel) -> Rotary | None:
    """None when it is not the usual kind: found out by rotating something both ways and comparing."""
    for module in model.modules():
        rotary = _read(module)
        if rotary is not None and _agrees(module, rotary):
            return rotary
    return None


def _read(module: nn.Module) -> Rotary | None:
    for prefix, layer_type in (("", None), (f"{_FULL}_", _FULL)):
        frequencies = getattr(module, f"{prefix}inv_freq", None)
        kind: Any = getattr(module, "rope_type", None)
        kind = kind.get(layer_type) if isinstance(kind, dict) else kind
        if isinstance(frequencies, torch.Tensor) and kind in _FIXED:
            return Rotary(
                frequencies.detach().float().clone(), float(getattr(module, f"{prefix}attention_scaling", 1.0))
            )
    return None


def _agrees(module: nn.Module, rotary: Rotary) -> bool:
    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        return False
    device = rotary.frequencies.device
    positions = torch.tensor([_SOME_POSITIONS], device=device)
    width = 2 * rotary.frequencies.shape[0]
    vectors = torch.linspace(-1, 1, 4 * width, device=device).reshape(1, 1, 4, width)
    for arguments in _arguments(module, vectors, positions):
        try:
            cos, sin = module(*arguments)
            turned, _ = apply(vectors, vectors, cos, sin)
        except (TypeError, ValueError, RuntimeError, AttributeError):
            continue
        return bool(torch.allclose(turned, rotary.rotate(vectors, positions[:, None]), atol=1e-4))
    return False


def _arguments(module: nn.Module, vectors: torch.Tensor, positions: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    if isinstance(getattr(module, "rope_type", None), dict):
        yield vectors, positions, _FULL
    yield vectors, positions
