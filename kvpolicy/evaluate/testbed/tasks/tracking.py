"""Tracking: `set falcon ruby .`, later `set maple falcon .`; `ask maple` is answered by the chain `falcon ruby`."""

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

SET, ASK = IDS["set"], IDS["ask"]
FACT_LENGTH = 4


def tracking(
    rng: np.random.Generator, length: int, *, links: int = 4, density: float = 0.2, drills: int = 0
) -> Episode:
    """Return an episode of several chains of ``links`` assignments each, about ``length`` tokens in the prompt."""
    room = length - 3
    most = len(NAME_IDS) // links
    chains = min(most, max(2, int(density * room) // (FACT_LENGTH * links)))
    names = rng.choice(NAME_IDS, (chains, links), replace=False)
    path = np.concatenate([rng.choice(VALUE_IDS, (chains, 1)), names], axis=1)
    facts = _facts(path)
    noise = noise_for(rng, room - FACT_LENGTH * len(facts))
    context = interleave(facts, noise, _slots(rng, chains, links, len(facts) + len(noise)))
    depths = np.concatenate([[links], rng.integers(1, links + 1, drills)])
    asked = rng.integers(0, chains, 1 + drills)
    questions = [_question(path[chain, : depth + 1]) for chain, depth in zip(asked, depths, strict=True)]
    return _episode(context, questions)


def _facts(path: TokenIds) -> TokenIds:
    chains, links = path.shape[0], path.shape[1] - 1
    shape = (chains, links)
    rows = [np.full(shape, SET), path[:, 1:], path[:, :-1], np.full(shape, STOP)]
    return np.stack(rows, axis=-1).reshape(-1, FACT_LENGTH)


def _slots(rng: np.random.Generator, chains: int, links: int, places: int) -> TokenIds:
    """Places of the assignments: random, but each chain in its own order."""
    return np.sort(rng.permutation(places)[: chains * links].reshape(chains, links), axis=1).ravel()


def _question(path: TokenIds) -> TokenIds:
    return join([[ASK], path[::-1], [EOS]])


def _episode(context: TokenIds, questions: list[TokenIds]) -> Episode:
    tokens = join([[BOS], context, *questions])
    context_end = 1 + len(context)
    weights = [np.r_[0.0, 0.0, np.ones(len(question) - 3), 0.2] for question in questions]
    answer_end = context_end + len(questions[0])
    padded = np.concatenate([np.zeros(context_end), *weights]).astype(np.float32)
    return Episode(tokens, padded, context_end, context_end + 2, answer_end)
