"""The next turn of a recorded agent, given what came before it: predictions against those with the full cache."""

import attrs
from transformers import PreTrainedTokenizerBase

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.data.transcripts import Transcript, transcripts
from kvpolicy.evaluate.models.text_encoding import has_template, rendered
from kvpolicy.evaluate.tasks.case import Continuation, Sources, TaskSizes, ids_of
from kvpolicy.evaluate.tasks.continuations import FIDELITY

_SHORTEST = 16  # tokens of a turn that is worth scoring


@attrs.frozen
class AgentTurns:
    """For each transcript its last turn of the agent that is long enough; the prompt is the end of what came before."""

    name: str = "agent"
    summary: str = "the next turn of recorded coding agents, against the full cache"
    metrics: tuple[str, ...] = FIDELITY

    def groups(self, sources: Sources, sizes: TaskSizes) -> tuple[tuple[Continuation, ...], ...]:
        """One group a transcript. Raises EvaluationError when too few transcripts are long enough."""
        cases = [case for one in transcripts() if (case := _case(sources.tokenizer, one, sizes)) is not None]
        if len(cases) < sizes.documents:
            raise EvaluationError(
                f"agent: {len(cases)} transcripts have {sizes.length} tokens before a turn of {_SHORTEST} and more: "
                f"{sizes.documents} are needed"
            )
        return tuple((cases[index * len(cases) // sizes.documents],) for index in range(sizes.documents))


def _case(tokenizer: PreTrainedTokenizerBase, transcript: Transcript, sizes: TaskSizes) -> Continuation | None:
    for index in range(len(transcript.turns) - 1, 0, -1):
        if transcript.turns[index].role != "assistant":
            continue
        turn = ids_of(tokenizer, transcript.turns[index].content)[: sizes.scored]
        before = ids_of(tokenizer, _rendered(tokenizer, transcript, index))
        if len(turn) >= _SHORTEST and len(before) >= sizes.length:
            return Continuation(tuple(before[-sizes.length :]), tuple(turn))
    return None


def _rendered(tokenizer: PreTrainedTokenizerBase, transcript: Transcript, count: int) -> str:
    """The first `count` turns, up to where the agent speaks: by the chat template, or line by line."""
    turns = [{"role": turn.role, "content": turn.content} for turn in transcript.turns[:count]]
    if not has_template(tokenizer):
        return "".join(f"{turn['role']}: {turn['content']}\n\n" for turn in turns) + "assistant: "
    return rendered(tokenizer, turns)
