"""Needles: sentences with a number each somewhere in real text, one of which is asked for.

The wording is that of RULER's `niah` tasks (arXiv:2404.06654) with numbers of five digits, which small models can copy.
"""

import random

import attrs

from kvpolicy.evaluate.tasks.case import Answer, Score, Sources, TaskSizes, ids_of
from kvpolicy.evaluate.tasks.chat_prompt import as_case_parts, chat_prompt
from kvpolicy.evaluate.tasks.documents import sentence_window, sentences_of, with_hidden

_CITIES = (
    *("Berlin", "Paris", "Madrid", "Rome", "Vienna", "Lisbon", "Dublin", "Oslo", "Athens", "Warsaw", "Prague"),
    *("Budapest", "Cairo", "Nairobi", "Lagos", "Tunis", "Delhi", "Tokyo", "Seoul", "Manila", "Jakarta", "Hanoi"),
    *("Lima", "Quito", "Havana", "Toronto", "Chicago", "Boston", "Denver", "Seattle", "Sydney", "Auckland"),
)
_NEEDLE = "One of the special magic numbers for {city} is: {number}. "
_INTRODUCTION = "Some special magic numbers are hidden within the following text. Memorize them.\n\n"
_ONE = (
    "What is the special magic number for {cities} mentioned in the text above?",
    ("The special magic number for {cities} mentioned in the text is"),
)
_SEVERAL = (
    "What are the special magic numbers for {cities} mentioned in the text above?",
    ("The special magic numbers for {cities} mentioned in the text are"),
)
TOKENS_A_NUMBER = 10  # of an answer


@attrs.frozen
class Needles:
    """Some needles a document, at depths that are spread evenly; `asked` of them at once."""

    name: str
    needles: int
    asked: int
    seen: bool  # whether scorers see the question when they compress the document
    summary: str
    metrics: tuple[str, ...] = ("correct",)

    def groups(self, sources: Sources, sizes: TaskSizes) -> tuple[tuple[Answer, ...], ...]:
        """One group a document."""
        sentences = sentences_of(sources.texts)
        return tuple(self._document(sources, sizes, sentences, index) for index in range(sizes.documents))

    def _document(self, sources: Sources, sizes: TaskSizes, sentences: list[str], index: int) -> tuple[Answer, ...]:
        rng = random.Random(f"{self.needles} {sizes.seed} {index}")  # noqa: S311 - makes questions
        context, cities, numbers = document_with_needles(rng, sources, sizes, sentences, index, self.needles)
        asked = rng.sample(range(self.needles), self.needles)[: sizes.questions * self.asked]
        return tuple(
            self._case(sources, context, [cities[one] for one in chosen], [numbers[one] for one in chosen])
            for chosen in (asked[start : start + self.asked] for start in range(0, len(asked), self.asked))
            if len(chosen) == self.asked
        )

    def _case(self, sources: Sources, context: str, cities: list[str], numbers: list[str]) -> Answer:
        question, answer = asking(cities)
        parts = chat_prompt(sources.tokenizer, context, question, answer)
        prompt, behind = as_case_parts(parts, seen=self.seen)
        return Answer(prompt, behind, TOKENS_A_NUMBER * len(numbers), {"correct": mentions(numbers)})


def document_with_needles(
    rng: random.Random, sources: Sources, sizes: TaskSizes, sentences: list[str], index: int, count: int
) -> tuple[str, list[str], list[str]]:
    """The `index`-th document, and the cities and numbers of its `count` needles, at depths that are spread evenly."""
    cities = rng.sample(_CITIES, count)
    numbers = [str(rng.randrange(10**4, 10**5)) for _ in cities]
    needles = [_NEEDLE.format(city=city, number=number) for city, number in zip(cities, numbers, strict=True)]
    taken = sum(len(ids_of(sources.tokenizer, needle)) for needle in needles)
    hay = sentence_window(sources.tokenizer, sentences, index, sizes.documents, sizes.length - taken)
    return _INTRODUCTION + with_hidden(hay, needles, index, sizes.documents), cities, numbers


def asking(cities: list[str]) -> tuple[str, str]:
    """The question for the numbers of some cities, and the words that the answer begins with."""
    question, answer = _ONE if len(cities) == 1 else _SEVERAL
    return question.format(cities=_listed(cities)), answer.format(cities=_listed(cities))


def mentions(numbers: list[str]) -> Score:
    """The share of the numbers that stand in the answer."""
    wanted = tuple(numbers)
    return lambda text: sum(number in text.replace(",", "") for number in wanted) / len(wanted)


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
