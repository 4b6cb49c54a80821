"""The hidden states that an attention module is given: found among the arguments of its forward."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kvpolicy.errors import UnsupportedModelError

_NAME = "hidden_states"  # under which attention modules of the library take them


def place_of(attention: nn.Module) -> int:
    """The place of the hidden states among the arguments of a module's forward.

    Raises UnsupportedModelError when it takes none by their usual name.
    """
    names = list(inspect.signature(attention.forward).parameters)
    if _NAME not in names:
        raise UnsupportedModelError(f"{type(attention).__name__} is given no {_NAME}")
    return names.index(_NAME)


def hidden_states_of(attention: nn.Module, args: tuple[Any, ...], call: Mapping[str, Any]) -> Tensor:
    """The hidden states [B, m, C] of one call. Raises UnsupportedModelError when there are none of this shape."""
    given, place = call.get(_NAME), place_of(attention)
    if given is None and place < len(args):
        given = args[place]
    if not isinstance(given, Tensor) or given.ndim != 3:
        shape = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise UnsupportedModelError(f"{type(attention).__name__} is given {_NAME} {shape}, expected [rows, tokens, C]")
    return given
