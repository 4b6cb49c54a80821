"""A digest that identifies a model by its configuration and weights."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpolicy.errors import CalibrationError, KVPolicyError

_MAX_SAMPLES = 64  # values of each weight in the digest
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


class _UnreadableWeightError(Exception):
    """A weight whose values cannot be read."""


@torch.inference_mode()
def model_digest(model: PreTrainedModel, error: type[KVPolicyError] = CalibrationError) -> str:
    """16 hex digits of the configuration and of evenly spaced samples of every weight.

    Weights are parameters and persistent buffers; floating point samples are rounded to bfloat16. So the digest is the
    same on every device, in float64, float32 and bfloat16, for every default dtype of torch, and whether or not weights
    are tied. A model in float16, which is rounded differently, has another digest. Offloaded weights of accelerate are
    read from where they are stored.

    Raises `error` if a weight cannot be read.
    """
    config = json.dumps(_without_volatile(model.config.to_dict()), sort_keys=True, default=str)
    digest = hashlib.sha256(config.encode())
    try:
        probes = {name: _probe(name, weight) for name, weight in _weights(model)}
    except _UnreadableWeightError as unreadable:
        raise error(f"the model cannot be identified: {unreadable}") from unreadable
    for _, probe in sorted(probes.items()):
        digest.update(probe)
    return digest.hexdigest()[:16]


def _without_volatile(config: Any) -> Any:
    """A configuration without keys that do not depend on the weights, also in nested ones."""
    if isinstance(config, dict):
        return {str(key): _without_volatile(value) for key, value in config.items() if key not in _VOLATILE}
    return [_without_volatile(member) for member in config] if isinstance(config, (list, tuple)) else config


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for prefix, module in modules.items():
        not_saved = module._non_persistent_buffers_set  # noqa: SLF001 there is no public name
        named = [*module._parameters.items(), *module._buffers.items()]  # noqa: SLF001 tied weights under each of their names
        for name, weight in named:
            if weight is not None and name not in not_saved:
                full_name = f"{prefix}.{name}" if prefix else name
                yield full_name, _offloaded(modules, full_name) if weight.device.type == "meta" else weight


def _offloaded(modules: Mapping[str, nn.Module], full_name: str) -> Tensor:
    """An offloaded weight, which hooks of accelerate on a module or a parent load for each forward."""
    path = full_name.split(".")
    for depth in reversed(range(len(path))):
        hook: Any = getattr(modules[".".join(path[:depth])], "_hf_hook", None)
        for single_hook in getattr(hook, "hooks", (hook,)):
            try:
                weight = single_hook.weights_map[".".join(path[depth:])]
            except Exception:  # noqa: BLE001, S112 any hook, which may read from a disk
                continue
            if isinstance(weight, Tensor) and weight.device.type != "meta":
                return weight
    raise _UnreadableWeightError(f"its weight {full_name!r} is not loaded")


def _probe(name: str, weight: Tensor) -> bytes:
    head = f"{name} {tuple(weight.shape)}".encode()
    try:
        return head + _values(weight.detach())
    except Exception as error:  # a tensor subclass may fail in any way
        class_name = type(weight).__name__
        raise _UnreadableWeightError(f"its weight {name!r} ({class_name}, {weight.dtype}) cannot be read") from error


def _values(weight: Tensor) -> bytes:
    """Bytes of up to `_MAX_SAMPLES` values, without a copy of the whole weight."""
    count = weight.numel()
    if not count:
        return b""
    probed = min(_MAX_SAMPLES, count)
    # Integers, because float32 cannot represent all indices beyond 2^24.
    indices = torch.tensor([index * (count - 1) // max(1, probed - 1) for index in range(probed)], dtype=torch.int64)
    weight = weight if weight.ndim else weight[None]
    sampled = weight[torch.unravel_index(indices.to(weight.device), weight.shape)].cpu()
    if sampled.is_complex():
        sampled = torch.view_as_real(sampled)
    rounded = sampled.to(torch.bfloat16).view(torch.int16) if sampled.is_floating_point() else sampled
    return rounded.to(torch.int64).numpy().tobytes()
