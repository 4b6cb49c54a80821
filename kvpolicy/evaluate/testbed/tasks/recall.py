"""Recall: `note falcon ruby .` stands somewhere amid filler, `ask falcon` is answered by `ruby`."""

import numpy as np

from kvpolicy.evaluate.testbed.tasks.episode import (
    BOS,
    EOS,
    NAME_IDS,
    STOP,
    VALUE_IDS,
    Episode,
    interleave,
    join,
    noise_for,
)
from kvpolicy.evaluate.testbed.vocabulary import IDS, TokenIds

NOTE, ASK = IDS["note"], IDS["ask"]
FACT_LENGTH = QUESTION_LENGTH = 4


def recall(rng: np.random.Generator, length: int, *, density: float = 0.2, drills: int = 0) -> Episode:
    """Return an episode whose prompt has about ``length`` tokens, ``density`` of them in facts."""
    room = length - 3
    count = min(len(NAME_IDS), max(2, int(density * room) // FACT_LENGTH))
    names = rng.choice(NAME_IDS, count, replace=False)
    values = rng.choice(VALUE_IDS, count)
    facts = np.stack([np.full(count, NOTE), names, values, np.full(count, STOP)], axis=1)
    noise = noise_for(rng, room - FACT_LENGTH * count)
    context = interleave(facts, noise, rng.permutation(count + len(noise))[:count])
    asked = rng.choice(count, 1 + drills, replace=drills >= count)
    questions = np.stack([np.full(1 + drills, ASK), names[asked], values[asked], np.full(1 + drills, EOS)], axis=1)
    return _episode(context, questions)


def _episode(context: TokenIds, questions: TokenIds) -> Episode:
    tokens = join([[BOS], context, questions.ravel()])
    context_end = 1 + len(context)
    weights = np.zeros(len(tokens), dtype=np.float32)
    weights[context_end:] = np.tile(np.array([0, 0, 1, 0.1], dtype=np.float32), len(questions))
    return Episode(tokens, weights, context_end, context_end + 2, context_end + QUESTION_LENGTH)
