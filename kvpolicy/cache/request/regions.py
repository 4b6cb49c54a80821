"""Regions: named spans of a request, such as the system prompt or tools, that policies can protect and plugins see."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from kvpolicy.errors import RegionError, did_you_mean, shown

Span = tuple[int, int]  # first token and end (exclusive), counted in a row's tokens without pads
Spans = Mapping[str, "Span | Sequence[Span]"]  # spans of one row, by name
_MAX_TOKENS = 2**24  # limit for regions read from files, because labels take a byte per token
MOST_NAMES = 127  # region numbers are int8


@attrs.frozen
class Regions:
    """Regions of each row of a batch. Tokens are counted without pads; regions do not overlap.

    They are passed when a cache is made, `attachment.cache(regions=...)`, and those of later turns are added to it,
    `cache.add_regions(...)`. Regions refer to tokens, so an evicted token leaves its region.
    """

    names: tuple[str, ...]  # numbered from 1
    rows: tuple[tuple[tuple[int, int, int], ...], ...]  # number, start, stop; ascending, for each row

    @classmethod
    def of(cls, regions: "Regions | Spans | Sequence[Spans]") -> "Regions":
        """Regions from token ranges: a mapping for one row, or a list with a mapping per row of the batch.

        Regions.of({"system": (0, 20), "tools": [(20, 50), (80, 95)]})

        Raises RegionError for invalid or overlapping ranges.
        """
        if isinstance(regions, Regions):
            return regions
        rows: Sequence[Any] = [regions] if isinstance(regions, Mapping) else regions
        if not isinstance(rows, Sequence) or not rows or not all(isinstance(row, Mapping) for row in rows):
            raise RegionError(
                f"regions must be a mapping from names to token ranges, or a list with one per row: {shown(regions)}"
            )
        names = tuple(dict.fromkeys(name for row in rows for name in row))
        _check_names(names)
        numbers = {name: number for number, name in enumerate(names, 1)}
        return cls(names, tuple(_row(row, numbers) for row in rows))

    @classmethod
    def of_texts(cls, tokenizer: Any, texts: "str | Sequence[str]", strings: Mapping[str, str]) -> "Regions":
        """Regions from strings in the texts of a batch, located by the token offsets of the tokenizer.

        Each string must occur in each text; all its occurrences belong to the region. A token belongs to it if any of
        its characters does. The texts must be those that are tokenized: with the chat template applied.

        Raises RegionError if a string does not occur, or if the tokenizer has no offsets (only fast ones have).
        """
        batch = [texts] if isinstance(texts, str) else list(texts)
        return cls.of([_spans_of_strings(tokenizer, text, strings) for text in batch])

    @classmethod
    def of_chat(cls, tokenizer: Any, conversations: Any, **template: Any) -> "Regions":
        """One region per role of a conversation, or of a batch of conversations, formatted by the chat template.

        The text of a message, including its header, belongs to the role of the message. `template` are further
        arguments of `apply_chat_template`, the same as for the prompt.

        Raises RegionError if the template formats a message differently when other messages come after it.
        """
        batch = [conversations] if conversations and isinstance(conversations[0], Mapping) else conversations
        return cls.of([_roles(tokenizer, list(messages), template) for messages in batch])

    def dump(self) -> str:
        """Names and rows as JSON; `parse` reads them."""
        return json.dumps([self.names, self.rows])

    @classmethod
    def parse(cls, text: str) -> "Regions":
        """Read the output of `dump`. Raises RegionError for other text."""
        try:
            names, rows = json.loads(text)
            named = [[(names[number - 1], (start, stop)) for number, start, stop in row if number > 0] for row in rows]
            regions = cls(tuple(names), tuple(tuple(tuple(span) for span in row) for row in rows))
            numbers = {name: number for number, name in enumerate(names, 1)}
        except (ValueError, TypeError, IndexError, RecursionError) as error:
            raise RegionError(f"regions must be names and rows of spans, as JSON: {shown(text)}") from error
        _check_names(names)
        normalised = tuple(
            _row({name: [span for n, span in row if n == name] for name in names}, numbers) for row in named
        )
        too_far = any(stop > _MAX_TOKENS for row in regions.rows for _, _, stop in row)
        if too_far or len(numbers) != len(names) or normalised != regions.rows:
            raise RegionError(
                f"regions must be ascending, must not overlap, and must end before token {_MAX_TOKENS}: {shown(text)}"
            )
        return regions

    def for_rows(self, count: int) -> "Regions":
        """Regions of a batch of `count` rows, with each row repeated as `generate` does (a, a, b, b).

        Raises RegionError if `count` is not a multiple of the rows.
        """
        if count % len(self.rows):
            raise RegionError(f"regions of {len(self.rows)} rows do not match a batch of {count}")
        return self.select([row for row in range(len(self.rows)) for _ in range(count // len(self.rows))])

    def select(self, rows: Sequence[int]) -> "Regions":
        """Regions of the given rows, in that order."""
        return attrs.evolve(self, rows=tuple(self.rows[row] for row in rows))

    def joined(self, other: "Regions") -> "Regions":
        """The spans of both, for as many rows; names keep their numbers, and new ones come after them.

        Raises RegionError if the rows are not as many, or spans overlap.
        """
        if len(self.rows) != len(other.rows):
            raise RegionError(f"regions of {len(other.rows)} rows do not match a batch of {len(self.rows)}")
        names = dict.fromkeys((*self.names, *other.names))
        both = zip(_by_name(self), _by_name(other), strict=True)
        return Regions.of([{name: [*own.get(name, ()), *new.get(name, ())] for name in names} for own, new in both])

    def require(self, names: Iterable[str]) -> None:
        """Raise RegionError if one of the names is not a region."""
        for name in names:
            if name not in self.names:
                raise RegionError(f"no region {shown(name)} is given{did_you_mean(name, self.names, 'given')}")


def _by_name(regions: Regions) -> list[dict[str, list[Span]]]:
    """The spans of each row."""
    numbered = list(enumerate(regions.names, 1))
    return [
        {name: [(start, stop) for own, start, stop in row if own == number] for number, name in numbered}
        for row in regions.rows
    ]


def _check_names(names: Sequence[object]) -> None:
    if not names:
        raise RegionError("regions must have at least one name")
    if len(names) > MOST_NAMES:
        raise RegionError(f"at most {MOST_NAMES} regions: {len(names)}")
    for name in names:
        if not isinstance(name, str) or not name:
            raise RegionError(f"the name of a region must be a word: {shown(name)}")


def _row(spans: Spans, numbers: Mapping[str, int]) -> tuple[tuple[int, int, int], ...]:
    ordered = sorted((*span, numbers[name]) for name, ranges in spans.items() for span in _spans(name, ranges))
    for (_, stop, number), (start, _, other) in itertools.pairwise(ordered):
        if start < stop:
            names = {number: name for name, number in numbers.items()}
            raise RegionError(f"regions {shown(names[number])} and {shown(names[other])} overlap at token {start}")
    return tuple((number, start, stop) for start, stop, number in ordered)


def _spans(name: str, ranges: object) -> list[Span]:
    candidates = [ranges] if isinstance(ranges, Sequence) and len(ranges) == 2 and type(ranges[0]) is int else ranges
    if not isinstance(candidates, Sequence) or isinstance(candidates, str):
        raise RegionError(f"region {shown(name)} must be a token range (start, stop), or several: {shown(ranges)}")
    spans = []
    for span in candidates:
        numbers = tuple(span) if isinstance(span, Sequence) and not isinstance(span, str) else ()
        sound = len(numbers) == 2 and all(type(number) is int for number in numbers)
        if not sound or not 0 <= numbers[0] <= numbers[1]:
            raise RegionError(f"region {shown(name)} must be ranges (start, stop), 0 <= start <= stop: {shown(span)}")
        if numbers[0] < numbers[1]:
            spans.append((numbers[0], numbers[1]))
    return spans


def _offsets(tokenizer: Any, text: str, **options: Any) -> list[Span]:
    """Character range of each token; empty for special tokens."""
    try:
        encoded = tokenizer(text, return_offsets_mapping=True, **options)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise RegionError("the tokenizer has no token offsets: only fast tokenizers have") from error
    return [(int(start), int(stop)) for start, stop in encoded["offset_mapping"]]


def _spans_of_strings(tokenizer: Any, text: str, strings: Mapping[str, str]) -> dict[str, list[Span]]:
    offsets = _offsets(tokenizer, text)
    regions: dict[str, list[Span]] = {}
    for name, string in strings.items():
        if not isinstance(string, str) or not string or string not in text:
            raise RegionError(f"region {shown(name)}: the text does not contain {shown(string)}")
        regions[name] = [_tokens(offsets, start, start + len(string)) for start in _occurrences(text, string)]
    return regions


def _occurrences(text: str, string: str) -> list[int]:
    starts, start = [], text.find(string)
    while start >= 0:
        starts.append(start)
        start = text.find(string, start + len(string))
    return starts


def _tokens(offsets: Sequence[Span], start: int, stop: int) -> Span:
    """Range of the tokens that have a character from `start` to `stop`."""
    inside = [token for token, (first, end) in enumerate(offsets) if max(first, start) < min(end, stop)]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _roles(tokenizer: Any, messages: list[Any], template: Mapping[str, Any]) -> dict[str, list[Span]]:
    options = {
        key: value for key, value in template.items() if key not in ("tokenize", "return_tensors", "return_dict")
    }
    full_text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    endings = ("add_generation_prompt", "continue_final_message")
    prefix_options = {key: value for key, value in options.items() if key not in endings}
    offsets, text_end, token_end = _offsets(tokenizer, full_text, add_special_tokens=False), 0, 0
    regions: dict[str, list[Span]] = {}
    for count, message in enumerate(messages, 1):
        prefix_text = tokenizer.apply_chat_template(messages[:count], tokenize=False, **prefix_options)
        if not full_text.startswith(prefix_text) or len(prefix_text) < text_end:
            raise RegionError(
                f"message {count - 1} ({shown(message['role'])}): the chat template formats it differently when "
                "others come after it; use Regions.of_texts"
            )
        start, stop = _tokens(offsets, text_end, len(prefix_text))
        # A token of two messages belongs to the first.
        regions.setdefault(str(message["role"]), []).append((max(start, token_end), stop))
        text_end, token_end = len(prefix_text), max(token_end, stop)
    return {role: _merge_adjacent(spans) for role, spans in regions.items()}


def _merge_adjacent(spans: Sequence[Span]) -> list[Span]:
    """Spans, with adjacent ones merged."""
    merged: list[Span] = []
    for start, stop in spans:
        if merged and start == merged[-1][1]:
            merged[-1] = (merged[-1][0], stop)
        elif start < stop:
            merged.append((start, stop))
    return merged
