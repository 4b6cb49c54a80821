"""What a cache holds does not depend on the modes of the caller: inference mode, autocast, compilation."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_T = TypeVar("_T")


def exact(kind: str) -> contextlib.AbstractContextManager[None]:
    """Tensors made inside can be written to later, and numbers keep their type, on devices of this kind.

    Those made in inference mode could not be written to outside of it; autocast would compute scores in 16 bits.
    """
    usual = not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled(kind)
    return contextlib.nullcontext() if usual else _exact(kind)


@contextlib.contextmanager
def _exact(kind: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.no_grad())
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def exactly(method: Callable[Concatenate[Any, _P], _T]) -> Callable[Concatenate[Any, _P], _T]:
    """A method of a cache layer whose body is `exact` on the layer's device."""

    @functools.wraps(method)
    def wrapped(self: Any, /, *args: _P.args, **options: _P.kwargs) -> _T:
        with exact(self.plan.device.type):
            return method(self, *args, **options)

    return wrapped


def taking_states(update: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's `update(keys, values, …)`: exact, given states in the type that is held, and left out of graphs."""
    exact_update = exactly(update)

    @outside_graphs
    @functools.wraps(update)
    def wrapped(self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> Any:
        keys, values = (widened(states, self.plan.dtype) for states in (key_states, value_states))
        return exact_update(self, keys, values, *args, **options)

    return wrapped


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that `torch.compile` leaves as it is: its work differs from call to call, by what is held."""
    left_out: Callable[..., Any] = torch.compiler.disable(function)

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return left_out(*args, **options)
        return function(*args, **options)

    return wrapped


def widened(states: Tensor, dtype: torch.dtype) -> Tensor:
    """States in the type that is held, where autocast made them narrower and nothing is lost; else as they are."""
    narrower = states.dtype != dtype and torch.promote_types(states.dtype, dtype) == dtype
    return states.to(dtype) if narrower and torch.is_autocast_enabled(states.device.type) else states
