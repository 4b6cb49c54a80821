"""Snapshots of the state of a model that a forward may change."""

import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

_SMALL_BUFFER = 2**16  # elements; larger buffers are not copied, statistics and frequencies are far smaller


class Snapshot:
    """State of modules, configurations and random generators. `restore` may be called several times.

    It has all attributes of modules and the contents of their dictionaries and lists (parameters, buffers, hooks), the
    attributes of all configurations, and the states of the random generators of torch, Python and numpy. It does not
    have the contents of tensors: `spare_buffers` replaces buffers that layers write to by copies.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        objects: list[Any] = [*model.modules(), *_configs(model)]
        self._attributes = [(owner, dict(vars(owner))) for owner in objects]
        self._containers = [
            (value, value.copy())
            for owner in objects
            for value in vars(owner).values()
            if isinstance(value, (dict, list, set))
        ]
        self._random = list(_generators(model))

    def restore(self) -> None:
        """Restore the state."""
        for owner, attributes in self._attributes:
            _refill(vars(owner), attributes, keep_order=False)
        for container, contents in self._containers:
            _refill(container, contents)
        for set_state, state in self._random:
            set_state(state)

    def spare_buffers(self, model: PreTrainedModel) -> None:
        """Replace small buffers by copies, so that in-place writes of a forward do not reach the originals."""
        copies: dict[int, Tensor] = {}
        for module in model.modules():
            buffers = vars(module)["_buffers"]
            for name, buffer in buffers.items():
                if type(buffer) is Tensor and buffer.numel() <= _SMALL_BUFFER:
                    buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    configs: dict[int, PretrainedConfig] = {}
    unvisited = [vars(module).get("config") for module in model.modules()]
    while unvisited:
        config = unvisited.pop()
        if isinstance(config, PretrainedConfig) and id(config) not in configs:
            configs[id(config)] = config
            unvisited.extend(vars(config).values())
    return list(configs.values())


def _generators(model: PreTrainedModel) -> Iterator[tuple[Any, Any]]:
    """A setter and the state of each random generator."""
    yield torch.set_rng_state, torch.get_rng_state()
    yield random.setstate, random.getstate()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield numpy.random.set_state, numpy.random.get_state()
    if torch.cuda.is_initialized():
        for device in {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}:
            state = torch.cuda.get_rng_state(device)
            yield (lambda kept, device=device: torch.cuda.set_rng_state(kept, device)), state


def _refill(container: Any, contents: Any, *, keep_order: bool = True) -> None:
    """Restore the contents of a container in place."""
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
