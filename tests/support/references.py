"""Slow and obvious forms of what the plugins compute, in float64."""

import numpy as np
import torch
from torch import Tensor

from kvpolicy.stages import View
from kvpolicy_plugins.scorers.attention_based.attention import Attention
from kvpolicy_plugins.scorers.shared.pooling import Pool


def causal_attention(queries: Tensor, keys: Tensor, scaling: float | None = None) -> Tensor:
    """Probabilities [B, H, Q, T] of the last Q tokens of T."""
    keys = keys.double().repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    factor = keys.shape[-1] ** -0.5 if scaling is None else scaling
    logits = factor * queries.double() @ keys.transpose(-1, -2)
    later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1 + logits.shape[-1] - logits.shape[-2])
    return logits.masked_fill(later, -torch.inf).softmax(-1)


def mass(probabilities: Tensor) -> Tensor:
    """What each entry receives: [B, H, Q, T] to float32 [B, H, T]."""
    return probabilities.sum(2).float()


def redundancy(keys: Tensor, threshold: float, forgive: int, end: str, empty_row: str) -> Tensor:
    """Step by step as published, with all pairs in memory: keys [T, D] of one head to scores [T]."""
    directions = keys.double() / (keys.double().norm(dim=-1, keepdim=True) + 1e-8)
    similarity = (directions @ directions.T).fill_diagonal_(0)
    for row in similarity:
        alike = (row > threshold).nonzero().flatten().tolist()
        chosen = alike[::-1][:forgive] if end == "last" else alike[:forgive]
        row[chosen] = 0
        if empty_row == "slot0" and not (chosen or (alike and forgive)):
            row[0] = 0
    return similarity.mean(0).softmax(-1)


def near_threshold(keys: Tensor, threshold: float) -> bool:
    """Whether rounding decides if two keys of [T, D] look alike."""
    directions = keys.double() / (keys.double().norm(dim=-1, keepdim=True) + 1e-8)
    return bool(((directions @ directions.T - threshold).abs() < 1e-5).any())


def attention_scores(view: View, scorer: Attention, row: int, head: int) -> np.ndarray:
    """Scores of the candidates of one head, in order."""
    held = view.positions[row, head] >= 0
    positions = view.positions[row, head][held].numpy()
    candidate = view.candidates[row, head][held].numpy()
    keys = view.keys[row, head][held].double().numpy()
    grouped = view.queries[row].double().unflatten(0, (view.keys.shape[1], -1))[head].numpy()
    asked = view.window_positions[row].numpy()
    grouped, asked = grouped[:, -scorer.queries :], asked[-scorer.queries :]
    grouped, asked = grouped[:, asked >= 0], asked[asked >= 0]
    visible = np.tile(candidate if scorer.softmax == "candidates" else np.ones_like(candidate), (len(asked), 1))
    if scorer.causal:
        visible = visible & (positions[None] <= asked[:, None])
    values = np.einsum("gwd,td->gwt", grouped, keys) * view.scaling
    for stage in ("logits", "probabilities", "scores", "pooled"):
        if stage == "probabilities":
            values = _softmax(values, visible)
        if stage == "scores":
            values = _over_queries(values, scorer)
        if stage == "pooled":
            values = np.stack([_pool(one[candidate], scorer.pool) for one in values])
        if stage == scorer.group_at:
            values = getattr(values, scorer.group)(axis=0, keepdims=True)
    return values[0]


def _softmax(logits: np.ndarray, visible: np.ndarray) -> np.ndarray:
    shifted = np.where(visible, logits - logits.max(-1, keepdims=True), -np.inf)
    weights = np.exp(shifted)
    total = weights.sum(-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def _over_queries(probabilities: np.ndarray, scorer: Attention) -> np.ndarray:
    scores = getattr(probabilities, scorer.reduce)(axis=1)
    if probabilities.shape[1] > 1:
        spread = probabilities.var if scorer.spread == "variance" else probabilities.std
        scores = scores + scorer.deviation * spread(axis=1, ddof=1)
    return scores


def _pool(scores: np.ndarray, pool: Pool) -> np.ndarray:
    reach = pool.size // 2
    if pool.kind == "none" or not len(scores):
        return scores
    around = [scores[max(0, at - reach) : at + reach + 1] for at in range(len(scores))]
    return np.array([near.max() if pool.kind == "max" else near.sum() / pool.size for near in around])
