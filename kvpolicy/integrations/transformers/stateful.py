"""A layer that keeps all that tokens change in one state, and shows its parts as attributes of its own."""

from operator import attrgetter
from typing import Any

from torch import Tensor

from kvpolicy.cache.layer_state import LayerState
from kvpolicy.cache.observation_window import ObservationWindow
from kvpolicy.cache.storage.layer_storage import LayerStorage
from kvpolicy.integrations.transformers.logical_layer import LogicalLayer


def _shown(name: str) -> Any:
    """The field of the layer's state that has the name, read and written. Many are read for every token: in C."""

    def write(layer: Any, value: Any) -> None:
        setattr(layer.state, name, value)

    return property(attrgetter(f"state.{name}"), write)


class StatefulLayer(LogicalLayer):
    """What the fields are is said in `LayerState`."""

    state: LayerState
    window: ObservationWindow = _shown("window")
    row_state: dict[str, Tensor] = _shown("row_state")
    num_tokens: list[int] = _shown("num_tokens")
    seq_len: int = _shown("seq_len")
    compressed: bool = _shown("compressed")
    padded: bool = _shown("padded")
    in_order: bool = _shown("in_order")
    rollback_limit: int = _shown("rollback_limit")
    scaling: float = _shown("scaling")
    record_past: bool = _shown("record_past")
    expects_prompt: bool = _shown("expects_prompt")
    _storage: LayerStorage = _shown("storage")  # all that the layer holds, lent or not
