"""The state of a model that a forward may touch, and how it is put back."""

import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

_SMALL = 2**16  # elements of a buffer up to which it is spared: statistics and frequencies are far smaller


class Snapshot:
    """What modules, configurations and random generators were like. `restore` may be called again and again.

    Kept are: every attribute of every module and what its dictionaries and lists hold (parameters, buffers, hooks); the
    attributes of all configurations; the state of the random generators of torch, of Python and of numpy. The contents
    of tensors are not: `spare_buffers` keeps a forward from writing to those that layers write to.
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
        self._random = list(_generators(model))

    def restore(self) -> None:
        """Put everything back."""
        for one, attributes in self._attributes:
            _refill(vars(one), attributes, keep_order=False)
        for container, contents in self._containers:
            _refill(container, contents)
        for put_back, state in self._random:
            put_back(state)

    def spare_buffers(self, model: PreTrainedModel) -> None:
        """Put copies in the place of small buffers, so that what a forward writes to them in place is lost."""
        copies: dict[int, Tensor] = {}
        for module in model.modules():
            buffers = vars(module)["_buffers"]
            for name, buffer in buffers.items():
                if type(buffer) is Tensor and buffer.numel() <= _SMALL:
                    buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())


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
