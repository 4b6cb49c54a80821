"""Votes of the observation window with keys repeated per query head."""

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from kvpolicy.bench.baselines.naive.layer_tensors import Entries, Held, gathered

_POOL = 7


def snapkv(held: Held, budget: int) -> Entries:
    """SnapKV (arXiv:2404.14469, section 4), one set of entries per KV head."""
    window = held.queries.shape[2]
    chosen = window_votes(held).topk(budget - window, -1).indices
    return gathered(held, chosen, window)


def adakv(held: Held, budget: int) -> list[Entries]:
    """Ada-KV (arXiv:2407.11550, section 3.2): the best of all heads of a layer together, then head by head."""
    window, (rows, heads) = held.queries.shape[2], held.keys.shape[:2]
    votes = window_votes(held)
    best = votes.flatten(1).topk((budget - window) * heads, -1).indices
    return [_of_head(held, best[row], row, head, votes.shape[-1]) for row in range(rows) for head in range(heads)]


def tova(held: Held, budget: int) -> Entries:
    """TOVA (arXiv:2401.06104, section 3.2): attention of the newest query, averaged over all heads."""
    keys = held.keys.repeat_interleave(held.group, 1)
    logits = held.queries[:, :, -1:] @ keys.transpose(-1, -2) * held.scaling
    mass = logits.softmax(-1, dtype=torch.float32).mean(1).squeeze(1)
    chosen = mass.topk(budget, -1).indices.sort(-1).values
    return gathered(held, chosen[:, None].expand(-1, held.keys.shape[1], -1), 0)


def window_votes(held: Held) -> Tensor:
    """[B, K, T - W]: sum over the window, mean over the group, maximum over neighbours."""
    window, (rows, heads) = held.queries.shape[2], held.keys.shape[:2]
    keys = held.keys.repeat_interleave(held.group, 1)
    logits = held.queries @ keys.transpose(-1, -2) * held.scaling
    later = torch.full((window, window), -torch.inf, device=logits.device, dtype=logits.dtype).triu(1)
    logits[..., -window:] += later
    probabilities = logits.softmax(-1, dtype=torch.float32).to(held.keys.dtype)
    votes = probabilities[..., :-window].sum(-2).view(rows, heads, held.group, -1).mean(2)
    return max_pool1d(votes, _POOL, 1, _POOL // 2)


def _of_head(held: Held, best: Tensor, row: int, head: int, past: int) -> Entries:
    own = best[(best >= head * past) & (best < (head + 1) * past)] - head * past
    one = Held(
        held.keys[row : row + 1, head : head + 1], held.values[row : row + 1, head : head + 1], held.queries, 1.0
    )
    return gathered(one, own[None, None], held.keys.shape[2] - past)
