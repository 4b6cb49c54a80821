"""R-KV with all pairs of keys in memory."""

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from kvpolicy.bench.baselines.naive.layer_tensors import Entries, LayerTensors, gathered

_POOL, _THRESHOLD, _IMPORTANCE = 7, 0.5, 0.1
PAIR_BYTES = 24  # of the temporaries for each pair of entries, at their peak


def rkv(layer: LayerTensors, budget: int) -> Entries:
    """R-KV (arXiv:2505.24133, section 3), redundancy of every row of the batch and not of the first alone."""
    window = layer.queries.shape[2]
    redundancy = _redundancy(layer.keys)[..., :-window]
    scores = _IMPORTANCE * _importance(layer) - (1 - _IMPORTANCE) * redundancy
    return gathered(layer, scores.topk(budget - window, -1).indices, window)


def _importance(layer: LayerTensors) -> Tensor:
    """[B, K, T - W]: maximum over the group of logits, mean over the window, maximum over neighbours."""
    rows, heads, _, dim = layer.keys.shape
    window = layer.queries.shape[2]
    queries = layer.queries.view(rows, heads, layer.group, window, dim)
    logits = (queries @ layer.keys[:, :, None].transpose(-1, -2) * layer.scaling).amax(2)
    votes = logits[..., :-window].softmax(-1, dtype=torch.float32).mean(-2)
    return max_pool1d(votes, _POOL, 1, _POOL // 2)


def _redundancy(keys: Tensor) -> Tensor:
    """[B, K, T]: mean similarity to all others, where each row has forgiven its newest look-alike."""
    directions = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    similarity = directions @ directions.transpose(-1, -2)
    slots = torch.arange(keys.shape[2], device=keys.device)
    similarity[..., slots, slots] = 0.0
    alike = similarity > _THRESHOLD
    newest = torch.where(alike, slots, torch.zeros_like(alike, dtype=torch.int64)).amax(-1, keepdim=True)
    forgiven = torch.zeros_like(similarity, dtype=torch.bool).scatter_(-1, newest, value=True)
    similarity = torch.where(forgiven, torch.zeros_like(similarity), similarity)
    return similarity.mean(-2).softmax(-1, dtype=torch.float32)
