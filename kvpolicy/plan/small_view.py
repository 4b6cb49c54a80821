"""A small view with random entries, to run plugins and kernels of a policy once before a model runs."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kvpolicy.stages import Geometry, Observer, Rotary, Sample, View, ViewPlugin
from kvpolicy.stages.checking.declared import needs_of, slot_state_of

_SLOTS = 16  # besides the observation window
_CHANNELS = 8  # of the hidden state


def small_view(
    plugins: Mapping[str, ViewPlugin],
    geometry: Geometry,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> View:
    """A view of one row with random entries and all inputs of the plugins; their keys are prefixes of state names."""
    needs = [needs_of(plugin) for plugin in plugins.values()]
    window = max(need.queries for need in needs)
    heads, dim, slots = geometry.kv_heads, geometry.head_dim, _SLOTS + window
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float32).to(device, dtype)

    mass = torch.rand(1, heads, slots, geometry.group, generator=random, dtype=torch.float32).to(device)
    rotary = Rotary(torch.ones(dim // 2, dtype=torch.float32, device=device))
    observers = {prefix: plugin for prefix, plugin in plugins.items() if isinstance(plugin, Observer)}
    states = {prefix + state.name: state for prefix, observer in observers.items() for state in slot_state_of(observer)}
    return View(
        keys=normal(1, heads, slots, dim),
        values=normal(1, heads, slots, dim),
        positions=torch.arange(slots, dtype=torch.int32, device=device).repeat(1, heads, 1),
        geometry=geometry,
        scaling=dim**-0.5,
        queries=normal(1, geometry.query_heads, window, dim) if window else None,
        attention=mass.transpose(-1, -2) if any(need.attention for need in needs) else None,
        slot_state={
            name: torch.full((1, heads, slots), state.fill, dtype=torch.float32, device=device)
            for name, state in states.items()
        },
        rotary=rotary if any(need.rotary for need in needs) else None,
        output_projection=(
            normal(geometry.query_heads, dim, _CHANNELS) if any(need.output_projection for need in needs) else None
        ),
        calibration=_calibrated(plugins, geometry, rotary, normal),
    )


def _calibrated(
    plugins: Mapping[str, ViewPlugin], geometry: Geometry, rotary: Rotary, normal: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """What the plugins measure on random entries; names begin with their prefixes."""
    dim = geometry.head_dim
    queries, keys, values = (
        normal(1, heads, _SLOTS, dim) for heads in (geometry.query_heads, geometry.kv_heads, geometry.kv_heads)
    )
    sample = Sample(geometry, dim**-0.5, rotary, queries, keys, values)
    return {
        prefix + name: tensor
        for prefix, plugin in plugins.items()
        if plugin.calibrated
        for name, tensor in plugin.calibrate([sample])[0].items()
    }
