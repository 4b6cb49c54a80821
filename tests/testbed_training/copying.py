"""Copying: random words, then pieces of them again from random places. Not evaluated: it teaches induction."""

import numpy as np

from kvpolicy.evaluate.testbed.tasks.episode import BOS, EOS, Episode, join
from kvpolicy.evaluate.testbed.vocabulary import DIGITS, NAMES, TOTALS, VALUES, ids_of

WORD_IDS = ids_of(NAMES + VALUES + DIGITS + TOTALS)
SHORTEST_SOURCE, LONGEST_PIECE = 6, 24


def copying(rng: np.random.Generator, length: int) -> Episode:
    """Return exactly ``length`` tokens: distinct words first, then copied pieces of random length and origin."""
    largest = min(len(WORD_IDS), int(0.6 * length))
    source = rng.permutation(WORD_IDS)[: int(np.exp(rng.uniform(np.log(SHORTEST_SOURCE), np.log(largest))))]
    parts: list[np.ndarray] = [np.array([BOS]), source]
    weights = [np.zeros(1 + len(source))]
    room = length - 1 - len(source)
    while room > 0:
        start = rng.integers(0, len(source) - 3)
        piece = source[start : start + rng.integers(3, LONGEST_PIECE)]
        parts += [np.array([EOS]), piece]
        weights += [np.zeros(2), np.ones(len(piece) - 1)]
        room -= 1 + len(piece)
    tokens, counted = join(parts)[:length], np.concatenate(weights)[:length].astype(np.float32)
    return Episode(tokens, counted, 1 + len(source), 1 + len(source), length)
