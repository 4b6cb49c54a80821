"""Text as it goes on: how close the predictions under a policy are to those with the full cache."""

import attrs

from kvpolicy.evaluate.tasks.case import Continuation, Sources, TaskSizes
from kvpolicy.evaluate.tasks.documents import token_windows

FIDELITY = ("kl", "top1", "agreed", "nll")


@attrs.frozen
class Continuations:
    """Pieces of the texts: the first tokens are the prompt, the next ones are predicted."""

    name: str = "text"
    summary: str = "predictions of the text that follows, against those with the full cache"
    metrics: tuple[str, ...] = FIDELITY

    def groups(self, sources: Sources, sizes: TaskSizes) -> tuple[tuple[Continuation, ...], ...]:
        """One group a document."""
        length = sizes.length + sizes.scored
        pieces = token_windows(sources.tokenizer, sources.texts, sizes.documents, length)
        return tuple((_case(piece, sizes.length),) for piece in pieces)


def _case(piece: list[int], prompt: int) -> Continuation:
    return Continuation(tuple(piece[:prompt]), tuple(piece[prompt:]))
