"""Products of queries and keys, the way a device is fast at."""

from functools import cache

import torch
from torch import Tensor

_LARGE = 2**15  # results of one product, from which on a CPU is slower at several products in one call


def products(queries: Tensor, keys: Tensor, scaling: float, dtype: torch.dtype | None = None) -> Tensor:
    """Scaled q·k, [S, Q, D] and [S, T, D] to float32 [S, Q, T]; summed in float32.

    They are computed in `dtype`. By default bfloat16 stays what it is where the device multiplies it natively: the sums
    are then rounded to bfloat16 once, after scaling. Everything else is computed in float32.
    """
    dtype = dtype or _fast(keys)
    queries, keys = queries.to(dtype), keys.to(dtype)
    alone = len(keys) == 1 or keys.device.type != "cpu"
    if alone or queries.shape[1] * keys.shape[1] < _LARGE:
        return _scaled(queries, keys, scaling)
    return torch.cat([_scaled(*one, scaling) for one in zip(queries.split(1), keys.split(1), strict=True)])


def _scaled(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    # `baddbmm`, because `alpha` scales before the result is rounded; what is added is nothing (`beta` = 0).
    nothing = queries.new_empty(1, 1, 1)
    return torch.baddbmm(nothing, queries, keys.transpose(1, 2), beta=0, alpha=scaling).float()


def _fast(keys: Tensor) -> torch.dtype:
    return keys.dtype if keys.dtype == torch.bfloat16 and multiplies_bfloat16(keys.device) else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 faster than those of float32, with float32 sums."""
    return device.type != "cpu" or _processor_multiplies_bfloat16()


@cache
def _processor_multiplies_bfloat16() -> bool:
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16"))
