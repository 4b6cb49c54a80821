"""The attention function registered with transformers under our name."""

import weakref
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.errors import UnsupportedCallError
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer
from kvpolicy.integrations.transformers.calls.attention_arguments import changing
from kvpolicy.integrations.transformers.calls.attention_implementation import (
    EAGER,
    NAME,
    SDPA,
    attention_function,
    mask_function,
    name_for,
)
from kvpolicy.integrations.transformers.calls.padding_mask import is_foreign, new_tokens_of, policy_mask
from kvpolicy.integrations.transformers.calls.uncompressed_forwards import UncompressedForwards
from kvpolicy.integrations.transformers.decode_graph.attend import attend_static
from kvpolicy.integrations.transformers.decode_graph.static_layer import StaticLayer
from kvpolicy.integrations.transformers.models.checking_layer import Attended, CheckingLayer, States, other_callers
from kvpolicy.integrations.transformers.passes.pass_cache import PassLayer
from kvpolicy.integrations.transformers.torch_modes import outside_graphs, widened

__all__ = ["NAME", "managed_modules", "policy_attention", "register"]

# Attention modules of attached models, and where it is noted that one of them ran without the cache of the policy.
managed_modules: "weakref.WeakKeyDictionary[nn.Module, UncompressedForwards]" = weakref.WeakKeyDictionary()


def policy_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    original: str = SDPA,
    **call: Any,
) -> Attended:
    """Attend, then let the layer that came with the keys observe and compress. [B, q, H, Dv].

    `original` is the implementation that the model was loaded with. It makes every call that is not ours to change:
    keys without a layer belong to a sliding window, a vision tower or a forward without cache; and until entries are
    evicted or packed it makes all others, with the very arguments and mask that it would get, so that the bits are
    those of the plain model.

    Raises UnsupportedCallError when entries are evicted, packed or chosen among, and an argument or a mask asks for
    something else than every query's attention to all tokens up to its own (see `arguments.changing`).
    """
    layer: PolicyLayer | PassLayer | StaticLayer | CheckingLayer | None = getattr(key, "kvpolicy_layer", None)
    if isinstance(layer, PolicyLayer):  # first, for it is asked at every token
        output: Attended = _attend(layer, module, (query, key, value, attention_mask), dropout, scaling, original, call)
        return output
    if isinstance(layer, StaticLayer):
        return attend_static(layer, query, query.shape[-1] ** -0.5 if scaling is None else scaling), None
    if isinstance(layer, CheckingLayer):
        stock = attention_function(original, module)
        return layer.watch(stock, module, (query, key, value, attention_mask), dropout, scaling, call)
    if isinstance(layer, PassLayer):
        of_pass: Attended = _attend_pass(layer, module, (query, key, value, attention_mask), scaling, original, call)
        return of_pass
    for seen in other_callers:
        seen.add(id(module))
    _note_uncompressed(module, query, key, call)
    stock = attention_function(original, module)
    plain: Attended = stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **call)
    return plain


@outside_graphs
def _attend(
    layer: PolicyLayer,
    module: nn.Module,
    states: States,
    dropout: float,
    scaling: float | None,
    original: str,
    call: dict[str, Any],
) -> Attended:
    """Attention over what a layer holds, which is then observed and compressed."""
    query, _, _, mask = states
    if layer.compressed or layer.would_compress():
        _refuse_changing(layer, query, mask, call)
    new_tokens = None if mask is None else new_tokens_of(mask)
    padded, factor = (
        new_tokens is not None and new_tokens.padded,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    queries = query if query.dtype == layer.plan.dtype else widened(query, layer.plan.dtype)
    batch = QueryBatch(queries, layer.place_tokens(new_tokens), padded=padded, scaling=factor)
    attended = layer.attend(batch, dropout)
    output: Attended
    if attended is not None:
        output = attended.transpose(1, 2).contiguous().to(query.dtype), None
    else:
        output = attention_function(original, module)(module, *states, dropout=dropout, scaling=scaling, **call)
    layer.finish_forward(batch)
    return output


@outside_graphs
def _attend_pass(
    layer: PassLayer, module: nn.Module, states: States, scaling: float | None, original: str, call: dict[str, Any]
) -> Attended:
    """Attention of a pass over what a layer holds and what came before in the pass."""
    query = states[0]
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    batch = QueryBatch(
        widened(query, layer.plan.dtype), layer.passes.positions, padded=layer.passes.padded, scaling=factor
    )
    attended = layer.attend(batch)
    output: Attended
    if attended is not None:
        output = attended.transpose(1, 2).contiguous().to(query.dtype), None
    else:
        output = attention_function(original, module)(module, *states, dropout=0.0, scaling=scaling, **call)
    layer.finish(batch)
    return output


def register(*originals: str) -> None:
    """Make our attention and its mask function known to transformers, beside the stock ones, for each implementation.

    Those of `eager` and `sdpa` are known from the start, so that a model that was attached can be unpickled.
    """
    for original in originals:
        name = name_for(original)
        if name not in ALL_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, partial(policy_mask, mask_function(original)))
            AttentionInterface.register(name, partial(policy_attention, original=original))


def _refuse_changing(layer: PolicyLayer, query: Tensor, mask: Tensor | None, call: dict[str, Any]) -> None:
    """Refuse what cannot be had where entries are evicted, packed or chosen among."""
    for name in changing(call, query.shape[1], query.shape[2], layer.seq_len):
        raise UnsupportedCallError(
            f"attention argument {name!r} cannot be carried across an eviction; "
            "raise the budget above the length, or detach the policy"
        )
    if mask is not None and _hides_more(layer, mask):
        raise UnsupportedCallError(
            "a mask that hides more than pads and later tokens cannot be carried across an eviction; "
            "raise the budget above the length, or detach the policy"
        )


def _hides_more(layer: PolicyLayer, mask: Tensor) -> bool:
    new_tokens = new_tokens_of(mask)
    return is_foreign(mask) or (new_tokens is not None and new_tokens.earlier != layer.num_tokens)


def _note_uncompressed(module: nn.Module, query: Tensor, key: Tensor, call: dict[str, Any]) -> None:
    """Managed attention without a layer of ours, where another cache takes part: it is filled, or attended to."""
    uncompressed = managed_modules.get(module)
    if uncompressed is not None and (call.get("use_cache") or key.shape[-2] > query.shape[-2]):
        uncompressed.warn("this forward uses a cache that the attached policy does not bound")


register(EAGER, SDPA)
