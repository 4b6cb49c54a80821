"""Contexts cut from texts: as many sentences, or tokens, as are wanted, each document from another place."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.data.texts import Text
from kvpolicy.evaluate.tasks.case import ids_of

_SENTENCE = re.compile(r"[^.!?]*(?:[.!?]+[\"')\]]*|$)\s*")


def sentences_of(texts: Sequence[Text]) -> list[str]:
    """All sentences of the texts in their order, with the space behind them."""
    return [sentence for text in texts for sentence in _SENTENCE.findall(text.text) if sentence.strip()]


def token_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], count: int, length: int
) -> list[list[int]]:
    """`count` pieces of `length` tokens that do not overlap, spread evenly over the texts one behind another.

    No piece crosses the border of two texts unless no text is long enough. Each begins as a sequence does for the
    tokenizer. Raises EvaluationError when the texts are too short.
    """
    start = ids_of(tokenizer, "", start=True)
    body = length - len(start)
    encoded = [ids_of(tokenizer, text.text) for text in texts]
    if not any(len(ids) >= body for ids in encoded):
        encoded = [[token for ids in encoded for token in ids]]
    if body < 1:
        raise EvaluationError(
            f"text: pieces of {length} tokens are too short: each begins with {len(start)} of its own"
        )
    places = [(index, offset) for index, ids in enumerate(encoded) for offset in range(0, len(ids) - body + 1, body)]
    if len(places) < count:
        have = sum(map(len, encoded))
        raise EvaluationError(f"text: {count} pieces of {length} tokens are needed, and the texts have {have} tokens")
    chosen = [places[index * len(places) // count] for index in range(count)]
    return [[*start, *encoded[index][offset : offset + body]] for index, offset in chosen]


def with_hidden(pieces: Sequence[str], hidden: Sequence[str], index: int, documents: int) -> str:
    """The pieces with hidden ones between them, at depths that are spread evenly.

    Documents shift the depths, so that all depths occur; this is the `index`-th of them.
    """
    parts = len(hidden) * documents
    places = [int((order * documents + index + 0.5) / parts * len(pieces)) for order in range(len(hidden))]
    found = list(pieces)
    for place, piece in sorted(zip(places, hidden, strict=True), reverse=True):
        found.insert(place, piece)
    return "".join(found)


def sentence_window(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], index: int, count: int, length: int
) -> list[str]:
    """Sentences of about `length` tokens, the `index`-th of `count` pieces spread evenly over all sentences.

    Raises EvaluationError when there are not enough.
    """
    first = index * len(sentences) // count
    ordered = [*sentences[first:], *sentences[:first]]
    chosen: list[str] = []
    total = 0
    for sentence in ordered:
        if total >= length:
            return chosen
        chosen.append(sentence)
        total += len(ids_of(tokenizer, sentence))
    if total < length:
        raise EvaluationError(f"text: {length} tokens are needed, and the texts have {total}")
    return chosen
