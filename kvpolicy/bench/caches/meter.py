"""Measures bytes held and time of a `generate` call, for any cache."""

import time
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvpolicy.integrations.transformers.cache_layer import PolicyLayer


class Meter:
    """Watches a model while it fills `cache`: bytes of storage after every layer, and when each forward ended."""

    def __init__(self, model: PreTrainedModel, cache: Cache, prompt_forwards: int = 1) -> None:
        self.cache = cache
        self.prompt_forwards = prompt_forwards
        self.peak_bytes = 0
        self.ends: list[float] = []  # host seconds; one a forward
        self.started = self.stopped = 0.0
        self._model = model
        self._peaks: dict[int, int] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        attention = [module for module in self._model.modules() if getattr(module, "layer_idx", None) is not None]
        self._hooks = [module.register_forward_hook(self._after_layer) for module in attention]
        self._hooks.append(self._model.register_forward_hook(self._after_forward))
        self.started = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped = self._now()
        for hook in self._hooks:
            hook.remove()

    @property
    def prompt_seconds(self) -> float:
        """From the start to the end of the last forward that takes in a part of the prompt."""
        return self.ends[self.prompt_forwards - 1] - self.started

    @property
    def decode_seconds(self) -> float:
        """From the end of the prompt to the end of the block."""
        return self.stopped - self.ends[self.prompt_forwards - 1]

    def _after_layer(self, module: nn.Module, *_args: object) -> None:
        layer = self.cache.layers[module.layer_idx]  # type: ignore[index]
        transient = 0
        if isinstance(layer, PolicyLayer):  # it was larger before it compressed itself
            top = layer.stats.peak_entry_bytes
            transient = max(0, top - layer_bytes(layer)) if top > self._peaks.get(layer.ordinal, 0) else 0
            self._peaks[layer.ordinal] = top
        self.peak_bytes = max(self.peak_bytes, held_bytes(self.cache) + transient)

    def _after_forward(self, *_args: object) -> None:
        self.ends.append(self._now())

    def _now(self) -> float:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return time.perf_counter()


def held_bytes(cache: Cache) -> int:
    """Bytes of storage of all entries that a cache holds, used or not."""
    return sum(map(layer_bytes, cache.layers))


def layer_bytes(layer: Any) -> int:
    """The same of one layer, a policy's or one of the model's library."""
    if isinstance(layer, PolicyLayer):
        return layer.storage.nbytes
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if isinstance(tensor, Tensor))


def window_bytes(cache: Cache) -> int:
    """Bytes of the queries that a policy's scorers observe, in all layers."""
    return sum(layer.state.window_bytes for layer in cache.layers if isinstance(layer, PolicyLayer))
