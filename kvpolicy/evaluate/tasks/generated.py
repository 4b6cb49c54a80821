"""The tasks of the embedded model, whose words no other tokenizer has."""

import attrs

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.tasks.case import Answer, Score, Sources, TaskSizes, ids_of, tokens_written
from kvpolicy.evaluate.testbed.tasks.item import Item, make_item

_ITEMS_A_GROUP = 16
_STARTS_A_TRACE = "reasoning"  # its question names the first step; asked twice, the model begins twice


@attrs.frozen
class Generated:
    """Held-out items of one of the embedded model's tasks; items are documents of one question."""

    task: str
    summary: str
    seen: bool = True

    @property
    def name(self) -> str:
        """That of the task, and how it is asked."""
        return self.task if self.seen else f"{self.task}-unseen"

    @property
    def metrics(self) -> tuple[str, ...]:
        """How long a trace is may depend on what is kept."""
        return ("correct", "prefix", "written") if self.task == _STARTS_A_TRACE else ("correct", "prefix")

    def groups(self, sources: Sources, sizes: TaskSizes) -> tuple[tuple[Answer, ...], ...]:
        """Groups of at most 16 items."""
        starts = range(0, sizes.documents, _ITEMS_A_GROUP)
        return tuple(
            tuple(
                self.case(sources, make_item(self.task, sizes.seed, index, sizes.length))
                for index in range(start, min(start + _ITEMS_A_GROUP, sizes.documents))
            )
            for start in starts
        )

    def case(self, sources: Sources, item: Item) -> Answer:
        """An item as a case.

        The question is asked behind the compressed prompt; where it is seen it also stands at the prompt's end.
        """
        shown = item.prompt if self.seen and self.task != _STARTS_A_TRACE else item.context
        tokenizer = sources.tokenizer
        question = ids_of(tokenizer, item.question)
        if not question:
            raise EvaluationError(f"{self.name}: an item without a question")
        known = {"correct": _whole(item), "prefix": _before_mistake(item), "written": tokens_written(tokenizer)}
        scores: dict[str, Score] = {name: known[name] for name in self.metrics}
        return Answer(tuple(ids_of(tokenizer, shown, start=True)), tuple(question), item.new_tokens, scores)


def _whole(item: Item) -> Score:
    """Whether all of the target was written, and nothing else."""
    return lambda text: float(text.split() == item.target.split())


def _before_mistake(item: Item) -> Score:
    """The share of the target's words before the first wrong one: a trace that breaks off can end in the right word."""

    def score(text: str) -> float:
        target, words = item.target.split(), text.split()
        right = 0
        for wanted, word in zip(target, words, strict=False):
            if wanted != word:
                break
            right += 1
        return right / len(target)

    return score
