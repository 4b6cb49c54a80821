"""Products of queries and keys, computed in the way that is fastest on the device."""

from functools import cache

import torch
from torch import Tensor

_LARGE_PRODUCT = 2**15  # results per head; a CPU computes larger products faster one by one than batched


def products(queries: Tensor, keys: Tensor, scaling: float, dtype: torch.dtype | None = None) -> Tensor:
    """Scaled q·k: [S, Q, D] and [S, T, D] to float32 [S, Q, T], with float32 sums.

    Computed in `dtype`. The default is bfloat16 for bfloat16 keys if the device multiplies it natively: the sums are
    rounded to bfloat16 once, after scaling. Otherwise it is float32.
    """
    dtype = dtype or _product_dtype(keys)
    queries, keys = queries.to(dtype), keys.to(dtype)
    in_one_call = len(keys) == 1 or keys.device.type != "cpu"
    if in_one_call or queries.shape[1] * keys.shape[1] < _LARGE_PRODUCT:
        return _scaled(queries, keys, scaling)
    return torch.cat([_scaled(*head, scaling) for head in zip(queries.split(1), keys.split(1), strict=True)])


def _scaled(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    # `baddbmm`, because `alpha` scales before the result is rounded; with `beta` = 0 its first argument is ignored.
    unused = queries.new_empty(1, 1, 1)
    return torch.baddbmm(unused, queries, keys.transpose(1, 2), beta=0, alpha=scaling).float()


def _product_dtype(keys: Tensor) -> torch.dtype:
    return keys.dtype if keys.dtype == torch.bfloat16 and multiplies_bfloat16(keys.device) else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 faster than those of float32, with float32 sums."""
    return device.type != "cpu" or _processor_multiplies_bfloat16()


@cache
def _processor_multiplies_bfloat16() -> bool:
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16"))
