"""What several methods compute from the observation window and the keys, in plain loops."""

import numpy as np

from tests.oracles.simulation import Head, Method, softmax


def attention(head: Head) -> np.ndarray:
    """Probabilities [W, G, T] of the observation window over all that is held."""
    return softmax(head.logits(head.window))


def pooled(scores: np.ndarray, size: int) -> np.ndarray:
    """The largest of each candidate and its neighbours among the candidates, `size` in all."""
    reach = size // 2
    return np.array([max(scores[max(0, i - reach) : i + reach + 1]) for i in range(len(scores))])


def by_largest(scores: np.ndarray) -> np.ndarray:
    """Scores as shares of the largest magnitude."""
    return scores / max(1e-30, np.abs(scores).max())


def redundancy(head: Head, method: Method, *, spare_first: bool) -> np.ndarray:
    """For every held entry the mean, over all held, of their cosine similarity to it; R-KV, section 3.3.

    Each entry forgives the newest of those that resemble it (above one half): its similarity to that one counts as 0.
    An entry that nobody resembles forgives the first slot, or no one.
    """
    keys = np.stack([entry.key for entry in head.entries])
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    similarity = keys @ keys.T
    np.fill_diagonal(similarity, 0.0)
    method.margin = min(method.margin, np.abs(similarity - 0.5).min())
    for row in similarity:
        alike = [slot for slot, value in enumerate(row) if value > 0.5]
        if alike:
            row[alike[-1]] = 0.0
        elif spare_first:
            row[0] = 0.0
    return similarity.mean(0)
