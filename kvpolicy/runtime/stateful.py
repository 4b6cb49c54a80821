"""A layer that keeps all that tokens change in one state, and shows its parts as attributes of its own."""

from typing import Any, Generic, TypeVar, overload

from torch import Tensor

from kvpolicy.runtime.holdings import Holdings
from kvpolicy.runtime.logical import LogicalLayer
from kvpolicy.runtime.state import LayerState
from kvpolicy.runtime.window import Window

_T = TypeVar("_T")


class _Field(Generic[_T]):
    """The field of the layer's state that has the same name, read and written."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, layer: None, owner: type) -> "_Field[_T]": ...
    @overload
    def __get__(self, layer: Any, owner: type) -> _T: ...
    def __get__(self, layer: Any, owner: type) -> "_T | _Field[_T]":
        if layer is None:
            return self
        value: _T = getattr(layer.state, self._name)
        return value

    def __set__(self, layer: Any, value: _T) -> None:
        setattr(layer.state, self._name, value)


class StatefulLayer(LogicalLayer):
    """What the fields are is said in `LayerState`."""

    state: LayerState
    window = _Field[Window]()
    row_state = _Field[dict[str, Tensor]]()
    real = _Field[list[int]]()
    seen = _Field[int]()
    altered = _Field[bool]()
    padded = _Field[bool]()
    in_order = _Field[bool]()
    rollback_limit = _Field[int]()
    scaling = _Field[float]()
    record_past = _Field[bool]()
    prompting = _Field[bool]()

    @property
    def _held(self) -> Holdings:
        """All that the layer holds, lent or not."""
        return self.state.held
