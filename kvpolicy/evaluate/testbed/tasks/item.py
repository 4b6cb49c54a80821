"""Items: a task's prompt and answer as text, reproducible from (task, seed, index, length)."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
from attrs import frozen

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.testbed.tasks.episode import Episode
from kvpolicy.evaluate.testbed.tasks.reasoning import reasoning
from kvpolicy.evaluate.testbed.tasks.recall import recall
from kvpolicy.evaluate.testbed.tasks.tracking import tracking
from kvpolicy.evaluate.testbed.vocabulary import MAXIMUM_LENGTH, text_of

TASKS: Final[Mapping[str, Callable[[np.random.Generator, int], Episode]]] = MappingProxyType(
    {"recall": recall, "tracking": tracking, "reasoning": reasoning}
)
EVALUATED: Final = tuple(TASKS)
SHORTEST: Final = 128


@frozen
class Item:
    """One question to the model.

    ``prompt`` is ``context`` and ``question``; ``target`` is all the model should write (a chain, a trace),
    ``answer`` its last word, which alone is scored; ``new_tokens`` is enough to write ``target`` and ``<eos>``.
    """

    task: str
    context: str
    question: str
    target: str
    answer: str
    new_tokens: int

    @property
    def prompt(self) -> str:
        """Return the text to generate from (the tokenizer adds ``<bos>``)."""
        return f"{self.context} {self.question}"


def make_item(task: str, seed: int, index: int, length: int = 1024) -> Item:
    """Return item ``index`` of stream ``seed``; ``length`` counts prompt tokens (reasoning: trace too)."""
    if task not in TASKS:
        raise EvaluationError(f"task: must be one of {', '.join(TASKS)}: {task!r}")
    if not SHORTEST <= length <= MAXIMUM_LENGTH:
        raise EvaluationError(f"length: must be between {SHORTEST} and {MAXIMUM_LENGTH}: {length}")
    rng = np.random.default_rng([EVALUATED.index(task), seed, index, length])
    return _item(task, TASKS[task](rng, length))


def is_correct(item: Item, generated_text: str) -> bool:
    """Tell whether the last word of ``generated_text`` (what follows the prompt, up to ``<eos>``) is the answer."""
    words = generated_text.partition("<eos>")[0].split()
    return bool(words) and words[-1] == item.answer


def _item(task: str, episode: Episode) -> Item:
    tokens = episode.tokens
    target = tokens[episode.prompt_end : episode.answer_end - 1]
    return Item(
        task=task,
        context=text_of(tokens[1 : episode.context_end]),
        question=text_of(tokens[episode.context_end : episode.prompt_end]),
        target=text_of(target),
        answer=text_of(target[-1:]),
        new_tokens=len(target) + 1,
    )
