"""Votes of the observation window with keys repeated per query head."""

import attrs
import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from kvpolicy.bench.baselines.naive.layer_tensors import Entries, LayerTensors, gathered

_POOL = 7


def snapkv(layer: LayerTensors, budget: int) -> Entries:
    """SnapKV (arXiv:2404.14469, section 4), one set of entries per KV head."""
    window = layer.queries.shape[2]
    chosen = window_votes(layer).topk(budget - window, -1).indices
    return gathered(layer, chosen, window)


def adakv(layer: LayerTensors, budget: int) -> list[Entries]:
    """Ada-KV (arXiv:2407.11550, section 3.2): the best of all heads of a layer together, then head by head."""
    window, (rows, heads) = layer.queries.shape[2], layer.keys.shape[:2]
    votes = window_votes(layer)
    best = votes.flatten(1).topk((budget - window) * heads, -1).indices
    return [_of_head(layer, best[row], row, head, votes.shape[-1]) for row in range(rows) for head in range(heads)]


def tova(layer: LayerTensors, budget: int) -> Entries:
    """TOVA (arXiv:2401.06104, section 3.2): attention of the newest query, averaged over all heads."""
    keys = layer.keys.repeat_interleave(layer.group, 1)
    logits = layer.queries[:, :, -1:] @ keys.transpose(-1, -2) * layer.scaling
    mass = logits.softmax(-1, dtype=torch.float32).mean(1).squeeze(1)
    chosen = mass.topk(budget, -1).indices.sort(-1).values
    return gathered(layer, chosen[:, None].expand(-1, layer.keys.shape[1], -1), 0)


def window_votes(layer: LayerTensors) -> Tensor:
    """[B, K, T - W]: sum over the window, mean over the group, maximum over neighbours."""
    window, (rows, heads) = layer.queries.shape[2], layer.keys.shape[:2]
    keys = layer.keys.repeat_interleave(layer.group, 1)
    logits = layer.queries @ keys.transpose(-1, -2) * layer.scaling
    later = torch.full((window, window), -torch.inf, device=logits.device, dtype=logits.dtype).triu(1)
    logits[..., -window:] += later
    probabilities = logits.softmax(-1, dtype=torch.float32).to(layer.keys.dtype)
    votes = probabilities[..., :-window].sum(-2).view(rows, heads, layer.group, -1).mean(2)
    return max_pool1d(votes, _POOL, 1, _POOL // 2)


def _of_head(layer: LayerTensors, best: Tensor, row: int, head: int, past: int) -> Entries:
    own = best[(best >= head * past) & (best < (head + 1) * past)] - head * past
    keys, values = (entries[row : row + 1, head : head + 1] for entries in (layer.keys, layer.values))
    return gathered(attrs.evolve(layer, keys=keys, values=values), own[None, None], layer.keys.shape[2] - past)
