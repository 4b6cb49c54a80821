"""Texts and conversations as token ids, and how many of them a model has positions for."""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from kvpolicy.errors import InputError, described, one_line

Message = dict[str, str]  # "role" and "content", as chat templates take them


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer knows how its model's conversations are written."""
    return bool(getattr(tokenizer, "chat_template", None))


def rendered(tokenizer: Any, messages: Sequence[Message]) -> str:
    """A conversation as its chat template writes it, up to where the model goes on. Raises InputError."""
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs: they raise of their own, and fail
        raise InputError(f"the chat template refuses this conversation: {described(error)}") from error
    return text


def token_ids(tokenizer: Any, text: str, *, special: bool, what: str = "text") -> list[int]:
    """Token ids of a text; with `special` those that the tokenizer puts around every text.

    Raises InputError, which says `what` has words that the tokenizer does not know.
    """
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    except Exception as error:  # tokenizers raises this very class, for a word that is not in its vocabulary
        raise InputError(f"the {what} has words that the tokenizer does not know: {one_line(error)}") from error
    return ids


def positions_of(config: PretrainedConfig) -> int | None:
    """How many positions a model knows; None if its configuration does not say."""
    most: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return most
