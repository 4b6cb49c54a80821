"""Prompts as token ids, and what is refused about them; every failure is an InputError."""

from typing import Any

from kvpolicy.errors import InputError
from kvpolicy.evaluate.models.text_encoding import Message, positions_of, token_ids


def opening(system: str | None) -> list[Message]:
    """The messages before the first question."""
    return [] if system is None else [{"role": "system", "content": system}]


def encoded(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Token ids of a prompt, at least one; with `special` those that the tokenizer puts around every text."""
    ids = token_ids(tokenizer, text, special=special, what="prompt")
    if not ids:
        raise InputError("the prompt has no tokens")
    return ids


def check_length(model: Any, length: int) -> None:
    """Refuse more tokens than the model has positions for."""
    most = positions_of(model.config)
    if most is not None and length > most:
        raise InputError(f"prompt and new tokens are {length} together, and the model knows {most} positions")
