"""Text as the testbed model was trained on: rows of one episode each, a context and many questions about it."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from torch import Tensor

from kvpolicy.evaluate.testbed.tasks.episode import Episode
from kvpolicy.evaluate.testbed.tasks.reasoning import reasoning
from kvpolicy.evaluate.testbed.tasks.recall import recall
from kvpolicy.evaluate.testbed.tasks.tracking import tracking


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
    {"recall": recall_row, "tracking": tracking_row, "reasoning": reasoning_row}
)


def training_text(seed: int, tasks: Sequence[str], length: int) -> Tensor:
    """Return token ids [len(tasks), ``length``], int64: one row for each task."""
    rng = np.random.default_rng([seed, 0])
    return torch.from_numpy(np.stack([ROWS[task](rng, length).tokens[:length] for task in tasks]))
