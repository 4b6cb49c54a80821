"""Several turns: the needles of one document are asked for one after another, in one conversation and one cache."""

import random

import attrs

from kvpolicy.evaluate.tasks.case import Answer, Score, Sources, TaskSizes, Turn
from kvpolicy.evaluate.tasks.chat_prompt import as_case_parts, chat_prompt, turn_of
from kvpolicy.evaluate.tasks.documents import sentences_of
from kvpolicy.evaluate.tasks.needles import TOKENS_A_NUMBER, asking, document_with_needles, mentions


@attrs.frozen
class Turns:
    """One conversation a document. What a policy evicts after the first question is not there for the next ones."""

    name: str = "turns"
    needles: int = 4
    summary: str = "four needles asked for in turns of one conversation; scorers see the first question"
    metrics: tuple[str, ...] = ("correct", "last")

    def groups(self, sources: Sources, sizes: TaskSizes) -> tuple[tuple[Answer, ...], ...]:
        """One group of one case a document."""
        sentences = sentences_of(sources.texts)
        return tuple((self._case(sources, sizes, sentences, index),) for index in range(sizes.documents))

    def _case(self, sources: Sources, sizes: TaskSizes, sentences: list[str], index: int) -> Answer:
        rng = random.Random(f"turns {sizes.seed} {index}")  # noqa: S311 - makes questions
        context, cities, numbers = document_with_needles(rng, sources, sizes, sentences, index, self.needles)
        first, *others = rng.sample(range(self.needles), self.needles)
        question, answer = asking([cities[first]])
        prompt, behind = as_case_parts(chat_prompt(sources.tokenizer, context, question, answer), seen=True)
        more = [
            Turn(turn_of(sources.tokenizer, *asking([cities[other]])), TOKENS_A_NUMBER, _scores([numbers[other]]))
            for other in others
        ]
        return Answer(prompt, behind, TOKENS_A_NUMBER, _scores([numbers[first]]), tuple(more))


def _scores(numbers: list[str]) -> dict[str, Score]:
    return {"correct": mentions(numbers)}
