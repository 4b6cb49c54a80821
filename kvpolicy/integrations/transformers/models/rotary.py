"""The rotary embedding of a live model, as something that can be undone."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kvpolicy.stages import Rotary

_FIXED = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length
_FULL = "full_attention"  # the layers that a policy manages, where kinds of layers have their own rotation
_SOME_POSITIONS = (0, 1, 7, 1000)


def rotary_of(model: PreTrainedModel) -> Rotary | None:
    """None when it is not the usual kind: found out by rotating something both ways and comparing."""
    return next(filter(None, map(_checked, model.modules())), None)


def _checked(module: nn.Module) -> Rotary | None:
    rotary = _read(module)
    return rotary if rotary is not None and _agrees(module, rotary) else None


def _read(module: nn.Module) -> Rotary | None:
    for prefix, layer_type in (("", None), (f"{_FULL}_", _FULL)):
        frequencies = getattr(module, f"{prefix}inv_freq", None)
        kind: Any = getattr(module, "rope_type", None)
        kind = kind.get(layer_type) if isinstance(kind, dict) else kind
        if isinstance(frequencies, torch.Tensor) and frequencies.device.type != "meta" and kind in _FIXED:
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
    vectors = torch.linspace(-1, 1, 4 * width, dtype=torch.float32, device=device).reshape(1, 1, 4, width)
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


def rotary_of_config(config: PretrainedConfig) -> Rotary | None:
    """The same from a configuration: the model is built without weights, and its embedding alone for real."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    built = (type(one)(one.config) for one in model.modules() if hasattr(one, "rope_type"))
    return next(filter(None, map(_checked, built)), None)
