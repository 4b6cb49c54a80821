"""Parses YAML text into items, within limits: PyYAML's safe loader can hang or crash on an untrusted file.

Only PyYAML's parser is used, which is iterative. Composing and resolving are done here; the limits are checked
for each event.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from kvpolicy.errors import PolicyError, Problem, shown
from kvpolicy.spec.scalars import resolve
from kvpolicy.spec.tree import MAX_BYTES, MAX_DEPTH, MAX_EVENTS, Item, Problems, SourcePosition, below

_SURROGATE = re.compile("[\ud800-\udfff]")


def read(data: bytes | str, label: str, problems: Problems) -> Item:
    """The only document of a file. Errors after which reading can continue are added to `problems`.

    Raises:
        PolicyError: `data` is not YAML, has anchors, aliases, tags or a second document, or exceeds a limit.
    """
    events = _guarded(_text(data, label), label)
    document = (event for event in events if not isinstance(event, _OUTER))
    root = _item(next(document, None), document, "", label, problems)
    for _ in document:  # raises errors that come after the document
        pass
    return root


_OUTER = (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentStartEvent, yaml.DocumentEndEvent)


def _text(data: bytes | str, label: str) -> str:
    if len(data) > MAX_BYTES or (isinstance(data, str) and len(data.encode("utf-8", "replace")) > MAX_BYTES):
        raise _error(SourcePosition(label, 1, 1), f"must be at most {MAX_BYTES // 1024} KiB")
    if isinstance(data, str):
        return data.removeprefix("\ufeff")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise _error(SourcePosition(label, line, column), f"must be UTF-8: byte {data[error.start]:#04x}") from error


def _guarded(text: str, label: str) -> Iterator[yaml.Event]:
    depth = documents = 0
    for count, event in enumerate(_parsed(text, label)):
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        for broken, rule in (
            (isinstance(event, yaml.AliasEvent), "must be written out: aliases (*name) are not allowed"),
            (getattr(event, "anchor", None), "must be written out: anchors (&name) are not allowed"),
            (getattr(event, "tag", None), "must be plain: tags (!name) are not allowed"),
            (documents > 1, "must be one document"),
            (depth > MAX_DEPTH, f"must be nested at most {MAX_DEPTH} deep"),
            (count >= MAX_EVENTS, "must be a policy: too many values"),
        ):
            if broken:
                raise _error(_position(event.start_mark, label), rule)
        yield event


def _parsed(text: str, label: str) -> Iterator[yaml.Event]:
    try:
        yield from yaml.parse(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        position = SourcePosition(label, before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise _error(position, f"must be text: character {error.character:#06x}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _error(_position(mark, label), f"must be YAML: {error.problem or error.context}") from error
    except (ValueError, OverflowError) as error:  # PyYAML converts some numbers without a check
        raise _error(SourcePosition(label, 1, 1), "must be YAML: a number in it is out of range") from error


def _item(event: yaml.Event | None, events: Iterator[yaml.Event], path: str, label: str, problems: Problems) -> Item:
    if event is None:  # an empty file
        return Item(None, SourcePosition(label, 1, 1))
    position = _position(event.start_mark, label)
    if isinstance(event, yaml.MappingStartEvent):
        return _mapping(position, events, path, problems)
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[Item] = []
        for item_event in _until(yaml.SequenceEndEvent, events):
            items.append(_item(item_event, events, below(path, len(items)), label, problems))
        return Item(tuple(items), position)
    return _scalar(event, position, path, problems)


def _scalar(event: Any, position: SourcePosition, path: str, problems: Problems) -> Item:
    if _SURROGATE.search(event.value):
        problems.add(position, path, "must be text: half of a surrogate pair")
        return Item("", position)
    return Item(resolve(event.value) if event.implicit[0] else event.value, position)


def _mapping(position: SourcePosition, events: Iterator[yaml.Event], path: str, problems: Problems) -> Item:
    entries: dict[str, Item] = {}
    keys: dict[str, SourcePosition] = {}
    for event in _until(yaml.MappingEndEvent, events):
        key = _item(event, events, path, position.label, problems)
        inner = below(path, key.value) if isinstance(key.value, str) else path
        value = _item(next(events), events, inner, position.label, problems)
        if not isinstance(key.value, str):
            problems.add(key.position, path, f"must have text as its keys: {shown(key.plain)}")
        elif key.value in entries:
            problems.add(key.position, inner, f"duplicate key; first at line {keys[key.value].line}")
        else:
            entries[key.value], keys[key.value] = value, key.position
    return Item(entries, position, keys)


def _until(end: type[yaml.Event], events: Iterator[yaml.Event]) -> Iterator[yaml.Event]:
    while not isinstance(event := next(events), end):
        yield event


def _position(mark: Any, label: str) -> SourcePosition:
    return SourcePosition(label, mark.line + 1, mark.column + 1)


def _error(position: SourcePosition, message: str) -> PolicyError:
    return PolicyError([Problem(position.at(""), message)])
