"""Prompts and conversations as token ids; every failure is an InputError."""

from typing import Any

from kvpolicy.errors import InputError, described, one_line

Message = dict[str, str]  # "role" and "content", as chat templates take them


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer knows how its model's conversations are written."""
    return bool(getattr(tokenizer, "chat_template", None))


def opening(system: str | None) -> list[Message]:
    """The messages before the first question."""
    return [] if system is None else [{"role": "system", "content": system}]


def rendered(tokenizer: Any, messages: list[Message]) -> str:
    """A conversation as its chat template writes it, up to where the model goes on."""
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs: they raise of their own, and fail
        raise InputError(f"the chat template refuses this conversation: {described(error)}") from error
    return text


def encoded(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Token ids of a text; with `special` those that the tokenizer puts around every text."""
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    except Exception as error:  # tokenizers raises this very class, for a word that is not in its vocabulary
        raise InputError(f"the prompt has words that the tokenizer does not know: {one_line(error)}") from error
    if not ids:
        raise InputError("the prompt has no tokens")
    return ids


def check_length(model: Any, length: int) -> None:
    """Refuse more tokens than the model has positions for."""
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and length > most:
        raise InputError(f"prompt and new tokens are {length} together, and the model knows {most} positions")
