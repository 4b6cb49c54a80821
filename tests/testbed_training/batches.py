"""Training batches: rows of one episode each, all tasks mixed, of exactly the same length."""

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from kvpolicy.evaluate.testbed.training_text import ROWS as EVALUATED_ROWS
from kvpolicy.evaluate.testbed.vocabulary import IDS
from tests.testbed_training.copying import copying

ROWS = {"copying": copying, **EVALUATED_ROWS}


@frozen(eq=False)
class Batch:
    """tokens [B, T] int64, weights [B, T] float32 (of predicting that token), and the task of each row."""

    tokens: Tensor
    weights: Tensor
    tasks: tuple[str, ...]


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
