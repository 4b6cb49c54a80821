"""Variable tracking: chains of assignments somewhere in real text; which variables have the value is asked.

After RULER's `vt` task (arXiv:2404.06654): one chain of `hops` assignments, the score is the share of its variables
that the answer names.
"""

import random
import string

import attrs

from kvpolicy.evaluate.tasks.case import Answer, Sources, TaskSizes, ids_of
from kvpolicy.evaluate.tasks.chat_prompt import as_case_parts, chat_prompt
from kvpolicy.evaluate.tasks.documents import sentence_window, sentences_of
from kvpolicy.evaluate.tasks.needles import mentions

_INTRODUCTION = "Memorize and track the chain of variable assignments hidden in the following text.\n\n"
_QUESTION = "Find all variables that are assigned the value {value} in the text above."
_ANSWER = "According to the chain of variable assignments in the text above, the variables assigned {value} are:"
_TOKENS_A_NAME = 8


@attrs.frozen
class Variables:
    """One chain a document."""

    name: str
    seen: bool
    summary: str
    hops: int = 2
    metrics: tuple[str, ...] = ("correct",)

    def groups(self, sources: Sources, sizes: TaskSizes) -> tuple[tuple[Answer, ...], ...]:
        """One group of one case a document."""
        sentences = sentences_of(sources.texts)
        return tuple((self._case(sources, sizes, sentences, index),) for index in range(sizes.documents))

    def _case(self, sources: Sources, sizes: TaskSizes, sentences: list[str], index: int) -> Answer:
        rng = random.Random(f"variables {sizes.seed} {index}")  # noqa: S311 - makes questions
        value = str(rng.randrange(10**4, 10**5))
        names = ["".join(rng.sample(string.ascii_uppercase, 5)) for _ in range(self.hops + 1)]
        assigned = [value, *(f"VAR {name}" for name in names)]
        chain = [f"VAR {name} = {right}. " for name, right in zip(names, assigned, strict=False)]
        taken = sum(len(ids_of(sources.tokenizer, sentence)) for sentence in chain)
        hay = sentence_window(sources.tokenizer, sentences, index, sizes.documents, sizes.length - taken)
        places = sorted(rng.sample(range(len(hay) + 1), len(chain)))
        for place, sentence in sorted(zip(places, chain, strict=True), reverse=True):
            hay.insert(place, sentence)
        question, answer = _QUESTION.format(value=value), _ANSWER.format(value=value)
        parts = chat_prompt(sources.tokenizer, _INTRODUCTION + "".join(hay), question, answer)
        prompt, behind = as_case_parts(parts, seen=self.seen)
        return Answer(prompt, behind, _TOKENS_A_NAME * len(names), {"correct": mentions(names)})
