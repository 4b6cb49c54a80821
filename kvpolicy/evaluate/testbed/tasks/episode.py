"""What a task produces, as token ids: the prompt, the answer that follows it, and (for training) further drills."""

from collections.abc import Sequence

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from kvpolicy.evaluate.testbed.vocabulary import (
    IDS,
    MANNERS,
    NAMES,
    QUALITIES,
    SUBJECTS,
    VALUES,
    VERBS,
    TokenIds,
    ids_of,
)

BOS, EOS, STOP = IDS["<bos>"], IDS["<eos>"], IDS["."]
NAME_IDS, VALUE_IDS = ids_of(NAMES), ids_of(VALUES)
NOTHING = -1
FILLER_WORDS = [ids_of(words) for words in (QUALITIES, SUBJECTS, VERBS, MANNERS)]
FILLER_MEAN_LENGTH = 5.0
Weights = NDArray[np.float32]


@frozen(eq=False)
class Episode:
    """One sequence of token ids and what each of them counts in the training loss.

    tokens [T] begins with ``<bos>``; ``tokens[:context_end]`` is what is to be remembered, ``tokens[:prompt_end]``
    adds the question, and ``tokens[prompt_end:answer_end]`` is what the model must write, ``<eos>`` included.
    What follows are drills: more questions about the same context. weights [T] is zero where nothing can be predicted.
    """

    tokens: TokenIds
    weights: Weights
    context_end: int
    prompt_end: int
    answer_end: int


def join(parts: Sequence[Sequence[int] | TokenIds]) -> TokenIds:
    """Return the token ids of all ``parts`` in one row [T]."""
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def filler(rng: np.random.Generator, sentences: int) -> TokenIds:
    """Return sentences of three to five words and a full stop, shape [sentences, 6]; words left out are -1."""
    quality, subject, verb, manner = (rng.choice(words, sentences) for words in FILLER_WORDS)
    article = rng.choice([IDS["the"], IDS["a"]], sentences)
    rows: TokenIds = np.stack([article, quality, subject, verb, manner, np.full(sentences, STOP)], axis=1)
    absent = rng.random((sentences, 2)) < 0.5
    rows[:, [1, 4]] = np.where(absent, NOTHING, rows[:, [1, 4]])
    return rows


def interleave(facts: TokenIds, noise: TokenIds, slots: NDArray[np.int64]) -> TokenIds:
    """Return all sentences in one row [T]: fact i in place ``slots[i]``, the noise around it.

    facts [F, width], noise [S, width'], slots [F] distinct and below F + S; words that are -1 are left out.
    """
    width = max(facts.shape[1], noise.shape[1])
    rows = np.full((len(facts) + len(noise), width), NOTHING, dtype=np.int64)
    taken = np.zeros(len(rows), dtype=bool)
    taken[slots] = True
    rows[slots, : facts.shape[1]] = facts
    rows[np.flatnonzero(~taken), : noise.shape[1]] = noise
    words: TokenIds = rows[rows != NOTHING]
    return words


def noise_for(rng: np.random.Generator, room: int) -> TokenIds:
    """Return about ``room`` tokens of filler as rows for `interleave`."""
    return filler(rng, max(1, round(room / FILLER_MEAN_LENGTH)))
