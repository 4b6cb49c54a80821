"""Whether what a plugin returned is what its contract promises. Cheap enough to run once per attachment."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kvpolicy.errors import PluginContractError, one_line, shown
from kvpolicy.stages.contracts import Plugin
from kvpolicy.stages.registry.plugins import registry
from kvpolicy.stages.view import View

_NOUNS = {
    "score": "scorer",
    "allocate.layers": "layer allocator",
    "allocate.heads": "head allocator",
    "allocate.joint": "joint allocator",
    "select": "selector",
    "merge": "merger",
    "store": "codec",
    "read": "reader",
}


def check_scores(plugin: Plugin, scores: object, view: View) -> None:
    """Refuses scores that are not float32 [B, K, T] on the device of the keys.

    Raises:
        PluginContractError: naming the plugin, what it returned and what was expected.
    """
    check_tensor(plugin, scores, seen_shape(view), torch.float32, view.keys.device)


def check_second_scores(plugin: Plugin, scores: object, view: View) -> None:
    """Refuses second scores that are neither float32 [B, K, T] nor [B, K, n, T] on the device of the keys.

    Raises:
        PluginContractError: naming the plugin, what it returned and what was expected.
    """
    shape = seen_shape(view)
    if isinstance(scores, Tensor) and scores.ndim == len(shape) + 1:
        shape = {"batch": shape["batch"], "kv_heads": shape["kv_heads"], "n": scores.shape[2], "seq": shape["seq"]}
    check_tensor(plugin, scores, shape, torch.float32, view.keys.device)


def seen_shape(view: View) -> dict[str, int]:
    """[B, K, T] of a view, with the names that messages use."""
    return dict(zip(("batch", "kv_heads", "seq"), view.positions.shape, strict=True))


def check_tensor(
    plugin: Plugin, returned: object, shape: Mapping[str, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The tensor, if it has that shape (sizes by name), dtype and device.

    Raises:
        PluginContractError: naming the plugin, what it returned and what was expected.
    """
    if not isinstance(returned, Tensor):
        raise contract_error(plugin, f"returned {type(returned).__name__}, expected a tensor")
    if tuple(returned.shape) != tuple(shape.values()):
        named = ", ".join(f"{name}={size}" for name, size in shape.items())
        raise contract_error(plugin, f"returned shape {tuple(returned.shape)}, expected ({named})")
    if returned.dtype != dtype:
        raise contract_error(plugin, f"returned {returned.dtype}, expected {dtype}")
    if returned.device != device:
        raise contract_error(plugin, f"returned a tensor on {returned.device}, expected {device}")
    return returned


def check_state(plugin: Plugin, fresh: object, held: Mapping[str, Tensor]) -> None:
    """Refuses new values of state, by name, that the plugin has not declared, or that are not like those held.

    What is computed in float64, as it is for a float64 model, may stand for float32.

    Raises:
        PluginContractError: naming the plugin, what it returned and what was expected.
    """
    if not isinstance(fresh, Mapping):
        raise contract_error(plugin, f"returned {shown(fresh)} as its state, expected tensors by name")
    unknown = [shown(name) for name in fresh if name not in held]
    if unknown:
        raise contract_error(plugin, f"returned state {unknown[0]}, expected only {sorted(held)}")
    for name, values in fresh.items():
        sizes = {f"{name}[{axis}]": size for axis, size in enumerate(held[name].shape)}
        wider = held[name].dtype == torch.float32 and getattr(values, "dtype", None) == torch.float64
        check_tensor(plugin, values, sizes, torch.float64 if wider else held[name].dtype, held[name].device)


def contract_error(plugin: Plugin, what: str) -> PluginContractError:
    """The error that says `what` a plugin did; names the plugin and the distribution it came with."""
    origin = _distribution(type(plugin))
    noun = _NOUNS.get(plugin.stage, plugin.stage)
    name = one_line(plugin.name, 60)
    return PluginContractError(f"plugin {name!r}{origin}: {noun} {name!r} {what}")


def _distribution(kind: type[Plugin]) -> str:
    """` (my-kv 1.2)`; nothing for a class that no installed distribution offers."""
    offered = (record for record in registry().plugins() if record.kind is kind)
    return next((f" ({record.distribution} {record.version})" for record in offered), "")
