"""A few hex digits that tell whether a model is the one that something was measured on."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpolicy.errors import CalibrationError, KVPolicyError

_PROBED = 64  # values of each weight that enter the digest
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


class _UnreadableError(Exception):
    """A weight of which no values can be had."""


@torch.inference_mode()
def model_digest(model: PreTrainedModel, error: type[KVPolicyError] = CalibrationError) -> str:
    """16 hex digits from the configuration and from values taken at even distances out of every weight.

    Weights are parameters and the buffers that are saved with them; of floating ones the values are rounded to
    bfloat16. So the digest is the same on every device, in float64, float32 and bfloat16, whatever torch's default
    dtype, and whether equal weights share their memory or not; a model in float16, whose values have been rounded
    otherwise, has one of its own. Weights that accelerate has put elsewhere are looked up there.

    Raises `error` when a weight cannot be read.
    """
    config = json.dumps(_lasting(model.config.to_dict()), sort_keys=True, default=str)
    found = hashlib.sha256(config.encode())
    try:
        probes = {name: _probe(name, weight) for name, weight in _weights(model)}
    except _UnreadableError as unreadable:
        raise error(f"the model cannot be told from others: {unreadable}") from unreadable
    for _, probe in sorted(probes.items()):
        found.update(probe)
    return found.hexdigest()[:16]


def _lasting(config: Any) -> Any:
    """A configuration without what says nothing about the weights, in its parts too."""
    if isinstance(config, dict):
        return {str(key): _lasting(value) for key, value in config.items() if key not in _VOLATILE}
    return [_lasting(one) for one in config] if isinstance(config, (list, tuple)) else config


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for prefix, module in modules.items():
        passing = module._non_persistent_buffers_set  # noqa: SLF001 there is no public name
        named = [*module._parameters.items(), *module._buffers.items()]  # noqa: SLF001 shared ones under each name
        for name, weight in named:
            if weight is not None and name not in passing:
                whole = f"{prefix}.{name}" if prefix else name
                yield whole, _kept_elsewhere(modules, whole) if weight.device.type == "meta" else weight


def _kept_elsewhere(modules: Mapping[str, nn.Module], whole: str) -> Tensor:
    """A weight that is brought in for each forward only, as accelerate's hooks on a module or one above it do."""
    parts = whole.split(".")
    for depth in reversed(range(len(parts))):
        hook: Any = getattr(modules[".".join(parts[:depth])], "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            try:
                kept = one.weights_map[".".join(parts[depth:])]
            except Exception:  # noqa: BLE001, S112 whatever a hook is, and whatever it reads from a disk
                continue
            if isinstance(kept, Tensor) and kept.device.type != "meta":
                return kept
    raise _UnreadableError(f"its weight {whole!r} is not loaded")


def _probe(name: str, weight: Tensor) -> bytes:
    head = f"{name} {tuple(weight.shape)}".encode()
    try:
        return head + _values(weight.detach())
    except Exception as error:  # a tensor subclass may fail in any way
        kind = type(weight).__name__
        raise _UnreadableError(f"its weight {name!r} ({kind}, {weight.dtype}) cannot be read") from error


def _values(weight: Tensor) -> bytes:
    """The bytes of up to `_PROBED` values; nothing of the size of the weight is made."""
    count = weight.numel()
    if not count:
        return b""
    probed = min(_PROBED, count)
    # Whole numbers: a float32 cannot count beyond 2^24.
    places = torch.tensor([index * (count - 1) // max(1, probed - 1) for index in range(probed)], dtype=torch.int64)
    weight = weight if weight.ndim else weight[None]
    picked = weight[torch.unravel_index(places.to(weight.device), weight.shape)].cpu()
    if picked.is_complex():
        picked = torch.view_as_real(picked)
    rounded = picked.to(torch.bfloat16).view(torch.int16) if picked.is_floating_point() else picked
    return rounded.to(torch.int64).numpy().tobytes()
