"""Questions with a verifier: word problems of GSM8K, and generated ones of reasoning-gym.

Prompts are short and answers long: what is evicted is what the model itself has written.
"""

from collections.abc import Sequence

import attrs

from kvpolicy.evaluate.data.questions import Question, gsm8k, reasoning_gym
from kvpolicy.evaluate.tasks.case import Answer, Sources, TaskSizes, tokens_written
from kvpolicy.evaluate.tasks.chat_prompt import as_case_parts, chat_prompt

_INSTRUCTION = "Reason step by step, then give the final answer."
_NEW_TOKENS = 256
_A_GROUP = 8


@attrs.frozen
class VerifiedQuestions:
    """`documents` questions of GSM8K, or of a generator of reasoning-gym, judged by their verifiers."""

    name: str
    generator: str = ""  # of reasoning-gym; empty for GSM8K
    metrics: tuple[str, ...] = ("correct", "written")

    @property
    def summary(self) -> str:
        """What is asked."""
        return f"questions of reasoning-gym's {self.generator}" if self.generator else "word problems of GSM8K"

    def groups(self, sources: Sources, sizes: TaskSizes) -> tuple[tuple[Answer, ...], ...]:
        """Groups of at most 8 questions. Raises what the data raises when it cannot be had."""
        count, seed = sizes.documents, sizes.seed
        questions = reasoning_gym(self.generator, count, seed) if self.generator else gsm8k(count, seed)
        cases = [_case(sources, question) for question in questions]
        return tuple(_parts(cases))


def _parts(cases: Sequence[Answer]) -> list[tuple[Answer, ...]]:
    return [tuple(cases[start : start + _A_GROUP]) for start in range(0, len(cases), _A_GROUP)]


def _case(sources: Sources, question: Question) -> Answer:
    parts = chat_prompt(sources.tokenizer, question.prompt.strip(), _INSTRUCTION)
    prompt, behind = as_case_parts(parts, seen=True)
    scores = {"correct": question.check, "written": tokens_written(sources.tokenizer)}
    return Answer(prompt, behind, _NEW_TOKENS, scores)
