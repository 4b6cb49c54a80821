"""The library's attention over keys and values that stand there as numbers, log-votes and masks added to logits."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def with_votes(votes: Tensor | None, seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the logits: log-votes [b, k, T], of what a query sees, bool [b, k or 1, q, T]; None = all."""
    if votes is None:
        return seen
    bias = votes[:, :, None].to(dtype)
    return bias if seen is None else bias.expand(seen.shape).masked_fill(~seen, -torch.inf)


def attend_to(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The library's attention, [b, H, q, Dv]; `bias` is [b, 1 or k, q, T], and None where every query sees all."""
    group, count = queries.shape[1] // keys.shape[1], queries.shape[2]
    if count == 1:
        return one_query(queries, keys, values, bias, **options)
    if bias is not None and bias.shape[1] > 1:
        bias = bias.repeat_interleave(group, 1)
    return scaled_dot_product_attention(queries, keys, values, attn_mask=bias, enable_gqa=group > 1, **options)


def one_query(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """[B, H, 1, Dv]: a group's queries stand in for query tokens of one head, so that keys are read once."""
    grouped = queries.reshape(queries.shape[0], keys.shape[1], -1, queries.shape[3])
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, **options)
    return out.reshape(*queries.shape[:3], -1)
