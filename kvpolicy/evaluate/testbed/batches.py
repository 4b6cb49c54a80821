"""Training batches: rows of one episode each, all tasks mixed, of exactly the same length."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from kvpolicy.evaluate.testbed.tasks.copying import copying
from kvpolicy.evaluate.testbed.tasks.episode import Episode
from kvpolicy.evaluate.testbed.tasks.reasoning import reasoning
from kvpolicy.evaluate.testbed.tasks.recall import recall
from kvpolicy.evaluate.testbed.tasks.tracking import tracking
from kvpolicy.evaluate.testbed.vocabulary import IDS


@frozen(eq=False)
class Batch:
    """tokens [B, T] int64, weights [B, T] float32 (of predicting that token), and the task of each row."""

    tokens: Tensor
    weights: Tensor
    tasks: tuple[str, ...]


def recall_row(rng: np.random.Generator, length: int) -> Episode:
    """Return a recall episode of at least ``length`` tokens, its last part questions."""
    prompt = int(length * rng.uniform(0.5, 0.9))
    return recall(rng, prompt, density=rng.uniform(0.15, 0.7), drills=(length - prompt) // 4 + length // 8)


def tracking_row(rng: np.random.Generator, length: int) -> Episode:
    """Return a tracking episode of at least ``length`` tokens, its last part questions."""
    prompt = int(length * rng.uniform(0.5, 0.9))
    links = int(rng.integers(2, 6))
    drills = (length - prompt) // 4 + length // 8
    return tracking(rng, prompt, links=links, density=rng.uniform(0.2, 0.7), drills=drills)


def reasoning_row(rng: np.random.Generator, length: int) -> Episode:
    """Return a reasoning episode of at least ``length`` tokens, its last part reports."""
    walked = int(length * rng.uniform(0.6, 1.0))
    return reasoning(rng, walked, early=1.0, drills=(length - walked) // 4 + 16)


ROWS: Final[Mapping[str, Callable[[np.random.Generator, int], Episode]]] = MappingProxyType(
    {"copying": copying, "recall": recall_row, "tracking": tracking_row, "reasoning": reasoning_row}
)


def make_batch(seed: int, step: int, mixture: tuple[str, ...], length: int) -> Batch:
    """Return the batch of ``step``: one row of ``length`` tokens for each task that ``mixture`` names."""
    rng = np.random.default_rng([seed, step])
    tokens = np.full((len(mixture), length), IDS["<pad>"], dtype=np.int64)
    weights = np.zeros((len(mixture), length), dtype=np.float32)
    for row, task in enumerate(mixture):
        episode = ROWS[task](rng, length)
        used = min(length, len(episode.tokens))
        tokens[row, :used] = episode.tokens[:used]
        weights[row, :used] = episode.weights[:used]
    return Batch(torch.from_numpy(tokens), torch.from_numpy(weights), mixture)
