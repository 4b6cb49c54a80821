"""What a task gives to be run: prompts that are compressed, and what must follow."""

from collections.abc import Callable, Mapping
from typing import Protocol

import attrs
from transformers import PreTrainedTokenizerBase

from kvpolicy.evaluate.data.texts import Text
from kvpolicy.evaluate.models.text_encoding import token_ids

Score = Callable[[str], float]  # of an answer as it was written


@attrs.frozen(eq=False)
class Turn:
    """A further question, asked once the answer before it has been written."""

    question: tuple[int, ...]  # ids, with what ends the answer before
    new_tokens: int  # written at most
    scores: Mapping[str, Score]  # by metric


@attrs.frozen(eq=False)
class Answer:
    """A question that the model answers greedily, after the prompt has been compressed."""

    prompt: tuple[int, ...]  # ids of what is compressed; scorers see all of it
    question: tuple[int, ...]  # ids that are computed behind it, at least one
    new_tokens: int  # written at most
    scores: Mapping[str, Score]  # by metric
    more: tuple[Turn, ...] = ()  # asked behind it, of the same cache; their scores are averaged with its own

    @property
    def behind(self) -> int:
        """Tokens that are computed at once behind the prompt."""
        return len(self.question)

    @property
    def tokens(self) -> int:
        """Tokens that a full cache holds in the end: the last one is never cached."""
        more = sum(len(turn.question) + turn.new_tokens for turn in self.more)
        return len(self.prompt) + len(self.question) + self.new_tokens + more - 1


@attrs.frozen(eq=False)
class Continuation:
    """Text that follows a prompt; the model's predictions of it are compared with those of the full cache."""

    prompt: tuple[int, ...]
    text: tuple[int, ...]  # ids; the prediction of the first does not depend on the policy and is not counted

    @property
    def behind(self) -> int:
        """Tokens of the text."""
        return len(self.text)

    @property
    def tokens(self) -> int:
        """Tokens that a full cache holds in the end: the last one is never cached."""
        return len(self.prompt) + len(self.text) - 1


Case = Answer | Continuation


@attrs.frozen
class TaskSizes:
    """How large the cases of a task are."""

    documents: int = 4  # different contexts
    length: int = 2048  # tokens of a prompt, about
    scored: int = 128  # tokens of a continuation
    questions: int = 4  # about each document, where a task asks several
    seed: int = 1


@attrs.frozen
class Sources:
    """Where the cases come from."""

    tokenizer: PreTrainedTokenizerBase
    texts: tuple[Text, ...]  # the user's, or essays


class Task(Protocol):
    """A kind of cases. Groups share nothing and are run one after another; the cases of a group are run at once."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def summary(self) -> str:
        """One line of help."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured of each case."""

    def groups(self, sources: Sources, sizes: TaskSizes) -> tuple[tuple[Case, ...], ...]:
        """The cases, always the same for the same arguments. Raises EvaluationError when they cannot be made."""


@attrs.frozen
class Metric:
    """How a number of a case is read."""

    name: str
    larger_is_better: bool
    percent: bool  # shown as a percentage
    help: str


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("correct", larger_is_better=True, percent=True, help="answers that are right"),
        Metric("last", larger_is_better=True, percent=True, help="answers of the last turn that are right"),
        Metric(
            "prefix", larger_is_better=True, percent=True, help="share of an answer's words before the first wrong one"
        ),
        Metric("written", larger_is_better=False, percent=False, help="tokens of an answer, without what ends it"),
        Metric(
            "kl", larger_is_better=False, percent=False, help="KL divergence from the full cache, nats a token, mean"
        ),
        Metric("top1", larger_is_better=True, percent=True, help="tokens whose likeliest is the full cache's"),
        Metric("agreed", larger_is_better=True, percent=False, help="tokens before the likeliest differs"),
        Metric("nll", larger_is_better=False, percent=False, help="negative log-likelihood of the text, nats a token"),
    )
}


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str, *, start: bool = False) -> list[int]:
    """Token ids of a text; with the tokens that begin a sequence if it is the `start` of one. Raises InputError."""
    return token_ids(tokenizer, text, special=start)


def tokens_written(tokenizer: PreTrainedTokenizerBase) -> Score:
    """How many tokens an answer has, what ends it not counted."""
    return lambda text: float(len(ids_of(tokenizer, text)))
