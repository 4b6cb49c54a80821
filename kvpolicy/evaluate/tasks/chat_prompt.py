"""A context and a question about it as a prompt: by the chat template of the tokenizer, or one after the other."""

import attrs
from transformers import PreTrainedTokenizerBase

from kvpolicy.evaluate.models.text_encoding import has_template, rendered
from kvpolicy.evaluate.tasks.case import ids_of

_CONTEXT, _QUESTION, _ANSWER = "kvpolicycontext", "kvpolicyquestion", "kvpolicyanswer"  # words that no template has


@attrs.frozen
class ChatPrompt:
    """Token ids of a prompt in three parts, which together are the whole prompt."""

    context: tuple[int, ...]  # with what a template puts before it
    question: tuple[int, ...]
    answer: tuple[int, ...]  # what the template puts before the answer, and the words that the answer begins with


def chat_prompt(tokenizer: PreTrainedTokenizerBase, context: str, question: str, answer: str = "") -> ChatPrompt:
    """The parts of a prompt with a context, a question and the first words of the answer."""
    before, between, behind = _frame(tokenizer)
    return ChatPrompt(
        tuple(ids_of(tokenizer, before + context, start=not has_template(tokenizer))),
        tuple(ids_of(tokenizer, between + question)),
        tuple(ids_of(tokenizer, behind + answer)),
    )


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """What stands before the context, before the question, and before the answer."""
    if not has_template(tokenizer):
        return "", "\n\n", "\n"
    text = rendered(tokenizer, [{"role": "user", "content": f"{_CONTEXT}\n\n{_QUESTION}"}])
    before, _, rest = text.partition(_CONTEXT)
    between, _, behind = rest.partition(_QUESTION)
    return before, between, behind


def turn_of(tokenizer: PreTrainedTokenizerBase, question: str, answer: str = "") -> tuple[int, ...]:
    """Token ids of a further turn: what ends the answer before, the question, and the first words of its answer."""
    between, behind = "\n\n", "\n"
    if has_template(tokenizer):
        texts = (_CONTEXT, _ANSWER, _QUESTION)
        roles = ("user", "assistant", "user")
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        between, _, behind = rendered(tokenizer, messages).partition(_ANSWER)[2].partition(_QUESTION)
    return tuple(ids_of(tokenizer, between + question + behind + answer))


def as_case_parts(parts: ChatPrompt, *, seen: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is compressed, and what is computed behind it; scorers see the question if it is `seen`."""
    if seen:
        return (*parts.context, *parts.question), parts.answer
    return parts.context, (*parts.question, *parts.answer)
