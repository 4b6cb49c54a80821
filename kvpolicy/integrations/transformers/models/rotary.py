"""The rotary embedding of a model, as an invertible `Rotary`."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kvpolicy.stages import Rotary

_SUPPORTED_TYPES = ("default", "linear", "llama3", "yarn")  # their frequencies do not depend on the length
_FULL_ATTENTION = "full_attention"  # managed layers, if layer types have different embeddings
_SOME_POSITIONS = (0, 1, 7, 1000)


def rotary_of(model: PreTrainedModel) -> Rotary | None:
    """The rotary embedding; None if it is not of a supported type, or differs from `Rotary` on sample vectors."""
    return next(filter(None, map(_checked, model.modules())), None)


def _checked(module: nn.Module) -> Rotary | None:
    rotary = _read(module)
    return rotary if rotary is not None and _agrees(module, rotary) else None


def _read(module: nn.Module) -> Rotary | None:
    for prefix, layer_type in (("", None), (f"{_FULL_ATTENTION}_", _FULL_ATTENTION)):
        frequencies = getattr(module, f"{prefix}inv_freq", None)
        rope_type: Any = getattr(module, "rope_type", None)
        rope_type = rope_type.get(layer_type) if isinstance(rope_type, dict) else rope_type
        if (
            isinstance(frequencies, torch.Tensor)
            and frequencies.device.type != "meta"
            and rope_type in _SUPPORTED_TYPES
        ):
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
            rotated, _ = apply(vectors, vectors, cos, sin)
        except (TypeError, ValueError, RuntimeError, AttributeError):
            continue
        return bool(torch.allclose(rotated, rotary.rotate(vectors, positions[:, None]), atol=1e-4))
    return False


def _arguments(module: nn.Module, vectors: torch.Tensor, positions: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    if isinstance(getattr(module, "rope_type", None), dict):
        yield vectors, positions, _FULL_ATTENTION
    yield vectors, positions


def rotary_of_config(config: PretrainedConfig) -> Rotary | None:
    """The rotary embedding of a configuration: only the embedding module is built with data."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = (type(module)(module.config) for module in model.modules() if hasattr(module, "rope_type"))
    return next(filter(None, map(_checked, modules)), None)
