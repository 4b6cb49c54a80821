"""Attention of one query a row over all slots of a static layer."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvpolicy.plan.plan import POSITIONS
from kvpolicy.runtime.static.layer import StaticLayer, layers
from kvpolicy.runtime.static.slots import Slots
from kvpolicy.stages import Glimpse


def attend_static(layer: StaticLayer, queries: Tensor, scaling: float) -> Tensor:
    """Attention [B, 1, H, Dv] of queries [B, H, 1, D]; followers see it, and the window takes the queries."""
    held = layer.slots
    packed = queries.reshape(*held.keys.shape[:2], -1, queries.shape[-1])  # the group's queries as tokens of one head
    if not layer.plan.followers:
        out = scaled_dot_product_attention(packed, held.keys, held.values, attn_mask=_seen(held), scale=scaling)
    elif torch.compiler.is_compiling():
        out = _follow_op(layer.name, packed, list(held.columns.values()), [held.keys, held.values], scaling)
    else:
        out = _follow(layer, held, packed, scaling)
    if held.ring is not None:
        held.ring.push(queries, layer.clock)
    return out.flatten(1, 2)[:, None]


def _seen(held: Slots) -> Tensor:
    """Bool [B, 1, 1, C]: heads hold different entries, but in the same slots."""
    return held.columns[POSITIONS][:, :1, None] >= 0


def _follow(layer: StaticLayer, held: Slots, packed: Tensor, scaling: float) -> Tensor:
    """Attention [B, K, G, Dv] whose logits followers see."""
    exact = torch.promote_types(packed.dtype, torch.float32)
    logits = (packed.to(exact) * scaling) @ held.keys.to(exact).transpose(-1, -2)
    glimpse = Glimpse(logits.masked_fill(~_seen(held), -torch.inf)[..., None, :])
    for one in layer.plan.followers:
        state = {name: held.columns[column] for name, column in one.columns.items()}
        for name, new in one.update(glimpse, state).items():
            state[name].copy_(new)
    return (glimpse.probabilities[..., 0, :] @ held.values.to(exact)).to(packed.dtype)


@torch.library.custom_op("kvpolicy::follow", mutates_args={"columns"})
def _follow_op(name: int, packed: Tensor, columns: list[Tensor], entries: list[Tensor], scaling: float) -> Tensor:
    layer = layers[name]
    held = layer.slots.standing_in([*entries, *columns, layer.slots.lengths], [])
    return _follow(layer, held, packed, scaling)


@_follow_op.register_fake
def _(_name: int, packed: Tensor, *_others: object) -> Tensor:
    return torch.empty_like(packed)
