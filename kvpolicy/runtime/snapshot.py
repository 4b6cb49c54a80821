"""The state of a model that a forward may touch, and how it is put back."""

import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

_SMALL = 2**16  # elements of a buffer up to which its contents are kept: statistics and frequencies are far smaller


class Snapshot:
    """What modules, configurations and random generators were like. `restore` may be called again and again.

    Kept are: every attribute of every module and what its dictionaries and lists hold (parameters, buffers, hooks); the
    contents of small buffers; the attributes of all configurations; the state of the random generators of torch, of
    Python and of numpy. Not kept are the contents of weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        objects: list[Any] = [*model.modules(), *_configs(model)]
        self._attributes = [(one, dict(vars(one))) for one in objects]
        self._containers = [
            (value, value.copy())
            for one in objects
            for value in vars(one).values()
            if isinstance(value, (dict, list, set))
        ]
        buffers = {id(buffer): buffer for buffer in model.buffers() if buffer.device.type != "meta"}
        self._buffers = [
            (buffer, _version(buffer), buffer.detach().clone())
            for buffer in buffers.values()
            if type(buffer) is Tensor and buffer.numel() <= _SMALL
        ]
        self._random = list(_generators(model))

    def restore(self) -> None:
        """Put everything back."""
        for one, attributes in self._attributes:
            _refill(vars(one), attributes, keep_order=False)
        for container, contents in self._containers:
            _refill(container, contents)
        for buffer, version, copied in self._buffers:
            if version is None or _version(buffer) != version:
                with torch.inference_mode(mode=version is None), torch.no_grad():
                    buffer.copy_(copied)
        for put_back, state in self._random:
            put_back(state)


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    found: dict[int, PretrainedConfig] = {}
    waiting = [vars(module).get("config") for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if isinstance(config, PretrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting.extend(vars(config).values())
    return list(found.values())


def _generators(model: PreTrainedModel) -> Iterator[tuple[Any, Any]]:
    """How each random generator is set, and its state."""
    yield torch.set_rng_state, torch.get_rng_state()
    yield random.setstate, random.getstate()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield numpy.random.set_state, numpy.random.get_state()
    if torch.cuda.is_initialized():
        for device in {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}:
            state = torch.cuda.get_rng_state(device)
            yield (lambda kept, device=device: torch.cuda.set_rng_state(kept, device)), state


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else int(tensor._version)  # noqa: SLF001 - there is no other name for it


def _refill(container: Any, contents: Any, *, keep_order: bool = True) -> None:
    """Make a container hold what it held, and nothing else."""
    if isinstance(container, dict):
        for name in [name for name in container if name not in contents]:
            del container[name]
        for name, value in contents.items():
            if name not in container or container[name] is not value:
                container[name] = value
        if keep_order and list(container) != list(contents):
            for name, value in contents.items():
                del container[name]
                container[name] = value
    elif isinstance(container, list):
        if len(container) != len(contents) or any(a is not b for a, b in zip(container, contents, strict=True)):
            container[:] = contents
    elif container != contents:
        container.clear()
        container.update(contents)
