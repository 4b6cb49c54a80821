"""The attention function registered with transformers under our name."""

import warnings
import weakref
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from kvpolicy.errors import UncompressedWarning, UnsupportedCallError
from kvpolicy.runtime.asked import Asked
from kvpolicy.runtime.layer import PolicyLayer
from kvpolicy.runtime.padding import arrival_of, is_foreign, policy_mask
from kvpolicy.runtime.static.attend import attend_static
from kvpolicy.runtime.static.layer import StaticLayer

NAME = "kvpolicy"

# What a call may carry without changing what is attended. Anything else could change the maths, and is refused.
_HARMLESS = frozenset({"position_ids", "use_cache", "output_hidden_states", "cache_position", "layer_idx"})

managed_modules: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # attention modules of attached models


def policy_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **call: Any,
) -> tuple[Tensor, None]:
    """Attend, then let the layer that came with the keys observe and compress. [B, q, H, Dv].

    Keys without a layer belong to a sliding window, a vision tower or a forward without cache: the stock call.
    Until entries are evicted or packed the stock call is made with the stock mask, so that the bits are those of the
    plain model.
    """
    layer: PolicyLayer | StaticLayer | None = getattr(key, "kvpolicy_layer", None)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(layer, StaticLayer):
        return attend_static(layer, query, factor), None
    if layer is None:
        _warn_if_uncompressed(module, call)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **call
        )
    _refuse_unknown(layer, attention_mask, call)
    arrival = arrival_of(attention_mask)
    positions = layer.arrive(arrival)
    asked = Asked(query, positions, padded=arrival is not None and arrival.padded, scaling=factor)
    attended = layer.attend(asked, dropout)
    if attended is not None:
        output = attended.transpose(1, 2).contiguous()
    else:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **call
        )
    layer.settle(asked)
    return output, None


def register() -> None:
    """Make our attention and its mask function known to transformers, beside the stock ones."""
    AttentionInterface.register(NAME, policy_attention)
    AttentionMaskInterface.register(NAME, policy_mask)


def _refuse_unknown(layer: PolicyLayer, mask: Tensor | None, call: dict[str, Any]) -> None:
    for name, value in call.items():
        without_effect = value is True if name == "is_causal" else value is False or name in _HARMLESS
        if value is not None and not without_effect:
            raise UnsupportedCallError(f"attention argument {name!r} cannot be carried across an eviction")
    if _hides_more(layer, mask) and (layer.altered or layer.would_alter()):
        raise UnsupportedCallError(
            "a mask that hides more than pads and later tokens cannot be carried across an eviction; "
            "raise the budget above the length, or detach the policy"
        )


def _hides_more(layer: PolicyLayer, mask: Tensor | None) -> bool:
    arrival = arrival_of(mask)
    return is_foreign(mask) or (arrival is not None and arrival.earlier != layer.real)


def _warn_if_uncompressed(module: nn.Module, call: dict[str, Any]) -> None:
    if call.get("use_cache") and module in managed_modules:
        warnings.warn(
            "this forward fills a cache that the attached policy does not bound; "
            "pass past_key_values=attachment.cache(), or use_cache=False",
            UncompressedWarning,
            stacklevel=2,
        )
