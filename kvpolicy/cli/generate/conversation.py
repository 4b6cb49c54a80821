"""A conversation on one cache: each turn computes its own tokens only."""

from typing import Any

from kvpolicy.cli.generate.tokens import check_length, encoded, opening
from kvpolicy.errors import InputError
from kvpolicy.evaluate.models.text_encoding import Message, rendered

_REWRITTEN = (
    "the chat template of this model writes earlier turns anew, so what the cache holds is no longer the conversation; "
    "ask each question with `kvpolicy run`"
)


class Conversation:
    """Messages, and the token ids that the cache has computed for them.

    What an assistant's turn was generated as stays as it is: it is not encoded anew from its text. All else is what the
    chat template writes for the whole conversation, which must therefore begin with what it wrote for the turns before.
    """

    def __init__(self, model: Any, tokenizer: Any, cache: Any, system: str | None) -> None:
        self._model, self._tokenizer, self._cache = model, tokenizer, cache
        self._messages = opening(system)
        self._written = ""  # by the template, for all turns up to the last answer
        self._ids: list[int] = []  # of the conversation up to the end of the last answer
        self._answer = ""

    def turn(self, text: str, max_new_tokens: int, **options: Any) -> str:
        """The answer to a message; `options` are those of `generate`, such as a streamer.

        Raises InputError when the template refuses the message or changes earlier turns, when the tokenizer does not
        know a word, and when the conversation outgrows the model's positions.
        """
        import torch

        messages: list[Message] = [*self._messages, {"role": "user", "content": text}]
        whole = rendered(self._tokenizer, messages)
        ids = [*self._ids, *encoded(self._tokenizer, self._continuation(whole), special=False)]
        check_length(self._model, len(ids) + max_new_tokens)
        tokens = torch.tensor([ids], device=self._model.device)
        output = self._model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=self._cache,
            max_new_tokens=max_new_tokens,
            **options,
        )
        new: list[int] = output[0, len(ids) :].tolist()
        if new[-1] in self._ends:  # it was chosen and not computed: the template will write what ends a turn
            del new[-1]
        self._answer = self._tokenizer.decode(new, skip_special_tokens=True)
        self._messages = [*messages, {"role": "assistant", "content": self._answer}]
        self._written, self._ids = whole, [*ids, *new]
        return self._answer

    def _continuation(self, whole: str) -> str:
        """What the template writes after the last answer; it may have cut white space around that answer."""
        if not whole.startswith(self._written):
            raise InputError(_REWRITTEN)
        rest, answer = whole[len(self._written) :], self._answer
        for kept in (answer, answer.rstrip(), answer.lstrip(), answer.strip()):
            if rest.startswith(kept):
                return rest[len(kept) :]
        raise InputError(_REWRITTEN)

    @property
    def _ends(self) -> set[int]:
        """Token ids that end a turn."""
        ends = self._model.generation_config.eos_token_id
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
