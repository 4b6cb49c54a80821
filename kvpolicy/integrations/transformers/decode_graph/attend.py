"""Attention of one query a row over all slots of a static layer."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvpolicy.integrations.transformers.decode_graph.decode_kernel import attend_in_kernel
from kvpolicy.integrations.transformers.decode_graph.static_layer import StaticLayer, layers
from kvpolicy.integrations.transformers.decode_graph.static_slots import StaticSlots, update_observers
from kvpolicy.plan.compress.kernel_errors import kernel_errors, note_once
from kvpolicy.plan.plan import POSITIONS
from kvpolicy.stages import QueryLogits


def attend_static(layer: StaticLayer, queries: Tensor, scaling: float) -> Tensor:
    """Attention [B, 1, H, Dv] of queries [B, H, 1, D]; observers see it, and the window takes the queries."""
    held = layer.slots
    packed = queries.reshape(*held.keys.shape[:2], -1, queries.shape[-1])  # the group's queries as tokens of one head
    if not layer.plan.observers and not layer.plan.kernels:
        out = _attend_plainly(held, packed, scaling)
    elif torch.compiler.is_compiling():
        entries = [held.keys, held.values, held.lengths]
        out = _attend_op(layer.name, packed, list(held.columns.values()), entries, scaling)
    else:
        out = _attend(layer, held, packed, scaling)
    if held.ring is not None:
        held.ring.push(queries, layer.clock)
    return out.flatten(1, 2)[:, None]


def _attend(layer: StaticLayer, held: StaticSlots, packed: Tensor, scaling: float) -> Tensor:
    """Attention [B, K, G, Dv] of [B, K, G, D]; observers see it."""
    plan = layer.plan
    if plan.kernels:
        try:
            return attend_in_kernel(plan, held, packed, scaling)
        except kernel_errors() as error:
            note_once(f"attention over static slots runs without a kernel: {error}")
            held = held.without_remains()
    if not plan.observers:
        return _attend_plainly(held, packed, scaling)
    exact = torch.promote_types(packed.dtype, torch.float32)
    logits = (packed.to(exact) * scaling) @ held.keys.to(exact).transpose(-1, -2)
    query_logits = QueryLogits(logits.masked_fill(~_seen(held), -torch.inf)[..., None, :])
    update_observers(held, query_logits, plan.observers)
    return (query_logits.probabilities[..., 0, :] @ held.values.to(exact)).to(packed.dtype)


def _attend_plainly(held: StaticSlots, packed: Tensor, scaling: float) -> Tensor:
    return scaled_dot_product_attention(packed, held.keys, held.values, attn_mask=_seen(held), scale=scaling)


def _seen(held: StaticSlots) -> Tensor:
    """Bool [B, 1, 1, C]: heads hold different entries, but in the same slots."""
    return held.columns[POSITIONS][:, :1, None] >= 0


@torch.library.custom_op("kvpolicy::attend", mutates_args={"columns"})
def _attend_op(name: int, packed: Tensor, columns: list[Tensor], entries: list[Tensor], scaling: float) -> Tensor:
    layer, (keys, values, lengths) = layers[name], entries
    return _attend(layer, layer.slots.standing_in([keys, values, *columns, lengths], []), packed, scaling)


@_attend_op.register_fake
def _(_name: int, packed: Tensor, *_others: object) -> Tensor:
    return torch.empty_like(packed)
