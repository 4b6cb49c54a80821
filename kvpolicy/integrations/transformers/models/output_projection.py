"""The linear layer that follows attention: found on attention modules, its weight read from the live model."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kvpolicy.errors import CacheError, UnsupportedModelError
from kvpolicy.stages import Geometry

_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "Wo", "wo")  # under which attention modules hold it
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class OutputProjection:
    """The output projection behind one attention module, which it holds weakly: a cache and its copies hold no weights.

    A cache gets it from the attachment that it belongs to; so does one that was unpickled, which has none before.
    """

    def __init__(self, attention: nn.Module, geometry: Geometry) -> None:
        self._attention, self._geometry = weakref.ref(attention), geometry

    def __call__(self) -> Tensor:
        """The weight as it is now, [H, Dv, C]. Raises CacheError when the model is gone."""
        attention = self._attention()
        if attention is None:
            raise CacheError("the model that this cache was used with is gone: its output projection cannot be read")
        return weight_of(attention, self._geometry)

    def __deepcopy__(self, _memo: dict[int, Any]) -> "OutputProjection":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _none, ()


def _none() -> None:
    return None


def weight_of(attention: nn.Module, geometry: Geometry, *, live: bool = True) -> Tensor:
    """The weight of the output projection of an attention module, [H, Dv, C]: a view of the parameter, detached.

    It is the one linear layer in the module that takes the outputs of all heads, H · Dv numbers, and has a usual name.
    A bias, and what else a model puts between attention and this layer, are left out; of an adapter around it the
    weight counts that it wraps, which it is merged into. With `live=False` the model may be without weights.

    Raises UnsupportedModelError when there is no such layer, when there are several, and when its weight is quantised,
    sharded or not there.
    """
    width = geometry.query_heads * geometry.head_dim
    found = [_unwrapped(child) for name, child in attention.named_children() if name in _NAMES]
    linear = [child for child in found if _inputs_of(child) == width]
    if len(linear) != 1:
        raise UnsupportedModelError(
            f"{type(attention).__name__} has {len(linear)} layers from {width} numbers that are called one of "
            + ", ".join(_NAMES)
        )
    weight: Any = getattr(linear[0], "weight", None)
    axis = 0 if isinstance(linear[0], Conv1D) else 1
    plain = type(weight) in (nn.Parameter, Tensor) and weight.dtype in _DTYPES and weight.ndim == 2
    if not plain or weight.shape[axis] != width:
        raise UnsupportedModelError(f"the weight of its {type(linear[0]).__name__} is quantised or sharded")
    if live and weight.device.type == "meta":
        raise UnsupportedModelError(f"the weight of its {type(linear[0]).__name__} is not on a device")
    by_head: Tensor = weight.detach().movedim(axis, 0).unflatten(0, (geometry.query_heads, geometry.head_dim))
    return by_head


def _unwrapped(layer: nn.Module) -> Any:
    """The layer that an adapter is around."""
    return getattr(layer, "base_layer", layer)


def _inputs_of(layer: Any) -> object:
    return getattr(layer, "nx" if isinstance(layer, Conv1D) else "in_features", None)
