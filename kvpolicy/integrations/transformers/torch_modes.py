"""Makes cache contents independent of the caller's modes: inference mode, autocast, compilation."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_T = TypeVar("_T")


def exact(device_type: str) -> contextlib.AbstractContextManager[None]:
    """Context without inference mode and autocast, on this type of device.

    Tensors made in inference mode cannot be written to outside it, and autocast would compute scores in 16 bits.
    """
    leaves, casts = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device_type)
    return _exact(device_type, leaves=leaves, casts=casts) if leaves or casts else _AS_IT_IS


_AS_IT_IS = contextlib.nullcontext()


@contextlib.contextmanager
def _exact(device_type: str, *, leaves: bool, casts: bool) -> Iterator[None]:
    with (
        torch.inference_mode(mode=False) if leaves else _AS_IT_IS,
        torch.no_grad() if leaves else _AS_IT_IS,
        torch.autocast(device_type, enabled=False) if casts else _AS_IT_IS,
    ):
        yield


def exactly(method: Callable[Concatenate[Any, _P], _T]) -> Callable[Concatenate[Any, _P], _T]:
    """A method of a cache layer whose body is `exact` on the layer's device."""

    @functools.wraps(method)
    def wrapped(self: Any, /, *args: _P.args, **options: _P.kwargs) -> _T:
        device_type = self.plan.device.type
        if torch.is_inference_mode_enabled() or torch.is_autocast_enabled(device_type):
            with exact(device_type):
                return method(self, *args, **options)
        return method(self, *args, **options)  # no context is entered at every token for nothing

    return wrapped


def taking_states(update: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a layer's `update(keys, values, …)`: exact, with states in the plan's dtype, excluded from compilation."""
    exact_update = exactly(update)

    @outside_graphs
    @functools.wraps(update)
    def wrapped(self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> Any:
        dtype = self.plan.dtype
        if key_states.dtype != dtype or value_states.dtype != dtype:
            key_states, value_states = widened(key_states, dtype), widened(value_states, dtype)
        return exact_update(self, key_states, value_states, *args, **options)

    return wrapped


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that `torch.compile` does not compile, because its work depends on the entries in the cache."""
    left_out: Callable[..., Any] = torch.compiler.disable(function)

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return left_out(*args, **options)
        return function(*args, **options)

    return wrapped


def widened(states: Tensor, dtype: torch.dtype) -> Tensor:
    """States cast to the plan's dtype if autocast made them narrower; otherwise unchanged."""
    narrower = states.dtype != dtype and torch.promote_types(states.dtype, dtype) == dtype
    return states.to(dtype) if narrower and torch.is_autocast_enabled(states.device.type) else states
