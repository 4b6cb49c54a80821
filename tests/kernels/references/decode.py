"""Attention of one query per segment, and packed vectors, one segment at a time and one code at a time."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention(queries, keys, values, scaling, votes, visible) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [G, D] over entries [n, ...]: output [G, Dv], raw logits [G, n] and weights [n, G], all float64."""
    hidden = ~visible[None]
    logits = (scaling * (queries.double() @ keys.double().T)).masked_fill(hidden, -torch.inf)
    weights = (logits + votes.double()).softmax(-1).masked_fill(hidden, 0)
    return weights @ values.double().masked_fill(~visible[:, None], 0), logits, weights.T


def in_own_dtype(queries, keys, values, scaling, votes, visible) -> tuple[Tensor, Tensor, Tensor]:
    """The same by torch in the dtype of the entries."""
    if not bool(visible.any()):
        empty = torch.zeros(len(queries), len(keys)).to(keys)
        return torch.zeros(len(queries), values.shape[1]).to(keys), empty - torch.inf, empty.T
    keys, values = keys[visible], values[visible]
    bias = votes[visible].to(keys.dtype)
    out = scaled_dot_product_attention(queries[None], keys[None], values[None], bias[None, None], scale=scaling)[0]
    logits = torch.full((len(queries), len(visible)), -torch.inf).to(keys)
    logits[:, visible] = (queries @ keys.T) * scaling
    weights = torch.zeros_like(logits)
    weights[:, visible] = (logits[:, visible] + bias).softmax(-1)
    return out, logits, weights.T


def codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Bytes [n, m] to codes [n, count], lowest bits first."""
    first = torch.arange(count, device=packed.device) * bits
    ahead = torch.nn.functional.pad(packed, (0, 1)).long()  # a code may begin in one byte and end in the next
    return ((ahead[:, first // 8] + 256 * ahead[:, first // 8 + 1]) >> first % 8 & 2**bits - 1).float()


def per_channel(columns: list[Tensor], bits: int, unit: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Codes [units, unit · bytes], scales and minima [units, D] to vectors [units · unit, D]."""
    packed, scales, minima = columns
    rows = []
    for place, one in enumerate(packed):
        own = codes(one.view(unit, -1), bits, dim)
        rows.append(own * scales[place].float() + minima[place].float())
    return torch.cat(rows).to(dtype) if rows else torch.zeros(0, dim, dtype=dtype, device=packed.device)


def per_token(columns: list[Tensor], bits: int, group: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Codes [n, bytes], scales and minima [n, D / group] to vectors [n, D]."""
    scales, minima = (one.float().repeat_interleave(group, 1) for one in columns[1:])
    return (codes(columns[0], bits, dim) * scales + minima).to(dtype)


def centred(columns, bits: int, group: int, heads: int, head: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Means [n, D]; codes, scales and minima of all heads, [n, K · …], to the vectors [n, D] of one head."""
    mean, *rest = columns
    own = [one.unflatten(1, (heads, -1))[:, head] for one in rest]
    return (mean.float() - per_token(own, bits, group, dim, torch.float32)).to(dtype)


def scaled_fp8(columns: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Codes [n, D] as bytes and peaks [n, 1] to vectors [n, D]; in this order of operations, for there are ties."""
    return (fp8(columns[:1], torch.float32) / 256 * (columns[1].float() * (256 / 448))).to(dtype)


def fp8(columns: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Codes [n, D] as bytes to vectors [n, D]."""
    return columns[0].cpu().view(torch.float8_e4m3fn).float().to(columns[0].device).to(dtype)


def codebook(columns: list[Tensor], bits: int, *levels: float, dim: int, dtype: torch.dtype) -> Tensor:
    """Codes [n, bytes] and norms [n, 1] to rotated vectors [n, D]."""
    vectors = torch.tensor(levels, dtype=torch.float64, device=columns[0].device)[codes(columns[0], bits, dim).long()]
    return (vectors * columns[1].double() / dim**0.5).to(dtype)
