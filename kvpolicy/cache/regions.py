"""Named spans of a request: the system prompt, tools, a document. A policy may protect them; plugins see them."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from kvpolicy.errors import RegionError, did_you_mean, shown

Span = tuple[int, int]  # first token, and the one behind the last; counted among a row's real tokens
Spans = Mapping[str, "Span | Sequence[Span]"]  # what one row has, by name
_FARTHEST = 2**24  # tokens, in what is read from a file: labels take a byte for each
MOST_NAMES = 127  # numbers of regions are int8


@attrs.frozen
class Regions:
    """Names, and where each row of a batch has them. Tokens are counted without pads; regions do not overlap.

    They are given with a cache, `attachment.cache(regions=...)`, and move with their entries: a token that is evicted
    leaves its region, and nothing enters one later.
    """

    names: tuple[str, ...]  # the region of the first one has number 1
    rows: tuple[tuple[tuple[int, int, int], ...], ...]  # number, start, stop; ascending, for each row

    @classmethod
    def of(cls, given: "Regions | Spans | Sequence[Spans]") -> "Regions":
        """From token ranges: of one row, or one mapping for each row of the batch.

        Regions.of({"system": (0, 20), "tools": [(20, 50), (80, 95)]})

        Raises RegionError for what is no range, or overlaps another one.
        """
        if isinstance(given, Regions):
            return given
        each: Sequence[Any] = [given] if isinstance(given, Mapping) else given
        if not isinstance(each, Sequence) or not each or not all(isinstance(row, Mapping) for row in each):
            raise RegionError(f"regions must be a mapping from names to token ranges, or one a row: {shown(given)}")
        names = tuple(dict.fromkeys(name for row in each for name in row))
        _check_names(names)
        numbers = {name: number for number, name in enumerate(names, 1)}
        return cls(names, tuple(_row(row, numbers) for row in each))

    @classmethod
    def of_texts(cls, tokenizer: Any, texts: "str | Sequence[str]", strings: Mapping[str, str]) -> "Regions":
        """Where strings stand in the texts of a batch, by the offsets of the tokenizer's tokens.

        Each string must stand in each of the texts; all places where it does belong to the region. A token belongs to
        it as soon as one of its characters does. Give the texts as they are tokenized: after the chat template.

        Raises RegionError when a string is not there, or when the tokenizer knows no offsets (only fast ones do).
        """
        batch = [texts] if isinstance(texts, str) else list(texts)
        return cls.of([_found(tokenizer, text, strings) for text in batch])

    @classmethod
    def of_chat(cls, tokenizer: Any, conversations: Any, **template: Any) -> "Regions":
        """One region for each role of a conversation, or of a batch of them, as the chat template writes it.

        What the template writes for a message, its header included, belongs to the message's role. `template` are
        further arguments of `apply_chat_template`, as they are given for the prompt itself.

        Raises RegionError where the template writes earlier messages otherwise once later ones follow.
        """
        batch = [conversations] if conversations and isinstance(conversations[0], Mapping) else conversations
        return cls.of([_roles(tokenizer, list(messages), template) for messages in batch])

    def dump(self) -> str:
        """Names and rows as JSON, for `parse`."""
        return json.dumps([self.names, self.rows])

    @classmethod
    def parse(cls, text: str) -> "Regions":
        """What `dump` has written. Raises RegionError for anything else."""
        try:
            names, rows = json.loads(text)
            named = [[(names[number - 1], (start, stop)) for number, start, stop in row if number > 0] for row in rows]
            regions = cls(tuple(names), tuple(tuple(tuple(span) for span in row) for row in rows))
            numbers = {name: number for number, name in enumerate(names, 1)}
        except (ValueError, TypeError, IndexError, RecursionError) as error:
            raise RegionError(f"regions must be names and rows of spans, as JSON: {shown(text)}") from error
        _check_names(names)
        again = tuple(_row({name: [span for n, span in row if n == name] for name in names}, numbers) for row in named)
        far = any(stop > _FARTHEST for row in regions.rows for _, _, stop in row)
        if far or len(numbers) != len(names) or again != regions.rows:
            raise RegionError(f"regions must be ascending, apart, and end before token {_FARTHEST}: {shown(text)}")
        return regions

    def for_rows(self, count: int) -> "Regions":
        """For a batch of so many rows: each of ours as often as needed, beside each other, as `generate` repeats rows.

        Raises RegionError when the rows are no multiple of ours.
        """
        if count % len(self.rows):
            raise RegionError(f"regions of {len(self.rows)} rows do not go with a batch of {count}")
        return self.select([row for row in range(len(self.rows)) for _ in range(count // len(self.rows))])

    def select(self, rows: Sequence[int]) -> "Regions":
        """Those of the rows named, in that order."""
        return attrs.evolve(self, rows=tuple(self.rows[row] for row in rows))

    def require(self, names: Iterable[str]) -> None:
        """Raise RegionError unless there are regions of these names."""
        for name in names:
            if name not in self.names:
                raise RegionError(f"no region {shown(name)} is given{did_you_mean(name, self.names, 'given')}")


def _check_names(names: Sequence[object]) -> None:
    if not names:
        raise RegionError("regions must have names: none is given")
    if len(names) > MOST_NAMES:
        raise RegionError(f"at most {MOST_NAMES} regions: {len(names)}")
    for name in names:
        if not isinstance(name, str) or not name:
            raise RegionError(f"the name of a region must be a word: {shown(name)}")


def _row(spans: Spans, numbers: Mapping[str, int]) -> tuple[tuple[int, int, int], ...]:
    listed = sorted((*span, numbers[name]) for name, given in spans.items() for span in _spans(name, given))
    for (_, stop, number), (start, _, other) in itertools.pairwise(listed):
        if start < stop:
            names = {number: name for name, number in numbers.items()}
            raise RegionError(f"regions {shown(names[number])} and {shown(names[other])} overlap at token {start}")
    return tuple((number, start, stop) for start, stop, number in listed)


def _spans(name: str, given: object) -> list[Span]:
    listed = [given] if isinstance(given, Sequence) and len(given) == 2 and type(given[0]) is int else given
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise RegionError(f"region {shown(name)} must be a token range (start, stop), or several: {shown(given)}")
    spans = []
    for span in listed:
        numbers = tuple(span) if isinstance(span, Sequence) and not isinstance(span, str) else ()
        sound = len(numbers) == 2 and all(type(number) is int for number in numbers)
        if not sound or not 0 <= numbers[0] <= numbers[1]:
            raise RegionError(f"region {shown(name)} must be ranges (start, stop), 0 <= start <= stop: {shown(span)}")
        if numbers[0] < numbers[1]:
            spans.append((numbers[0], numbers[1]))
    return spans


def _offsets(tokenizer: Any, text: str, **options: Any) -> list[Span]:
    """Characters of each token, special ones, which stand for none, included."""
    try:
        encoded = tokenizer(text, return_offsets_mapping=True, **options)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise RegionError("the tokenizer tells no offsets of its tokens: only fast tokenizers do") from error
    return [(int(start), int(stop)) for start, stop in encoded["offset_mapping"]]


def _found(tokenizer: Any, text: str, strings: Mapping[str, str]) -> dict[str, list[Span]]:
    offsets = _offsets(tokenizer, text)
    regions: dict[str, list[Span]] = {}
    for name, string in strings.items():
        if not isinstance(string, str) or not string or string not in text:
            raise RegionError(f"region {shown(name)}: the text does not hold {shown(string)}")
        regions[name] = [_tokens(offsets, start, start + len(string)) for start in _places(text, string)]
    return regions


def _places(text: str, string: str) -> list[int]:
    places, start = [], text.find(string)
    while start >= 0:
        places.append(start)
        start = text.find(string, start + len(string))
    return places


def _tokens(offsets: Sequence[Span], start: int, stop: int) -> Span:
    """The tokens that have a character between two places."""
    inside = [token for token, (first, behind) in enumerate(offsets) if max(first, start) < min(behind, stop)]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _roles(tokenizer: Any, messages: list[Any], template: Mapping[str, Any]) -> dict[str, list[Span]]:
    given = {key: value for key, value in template.items() if key not in ("tokenize", "return_tensors", "return_dict")}
    whole = tokenizer.apply_chat_template(messages, tokenize=False, **given)
    endings = ("add_generation_prompt", "continue_final_message")
    plain = {key: value for key, value in given.items() if key not in endings}
    offsets, before, behind = _offsets(tokenizer, whole, add_special_tokens=False), 0, 0
    regions: dict[str, list[Span]] = {}
    for count, message in enumerate(messages, 1):
        written = tokenizer.apply_chat_template(messages[:count], tokenize=False, **plain)
        if not whole.startswith(written) or len(written) < before:
            raise RegionError(
                f"message {count - 1} ({shown(message['role'])}): the chat template writes it otherwise when others "
                "follow; give regions by strings (Regions.of_texts)"
            )
        start, stop = _tokens(offsets, before, len(written))
        regions.setdefault(str(message["role"]), []).append((max(start, behind), stop))  # a shared token is the first's
        before, behind = len(written), max(behind, stop)
    return {role: _joined(spans) for role, spans in regions.items()}


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Spans that follow each other as one."""
    joined: list[Span] = []
    for start, stop in spans:
        if joined and start == joined[-1][1]:
            joined[-1] = (joined[-1][0], stop)
        elif start < stop:
            joined.append((start, stop))
    return joined
