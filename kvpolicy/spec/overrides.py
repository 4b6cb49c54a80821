"""Replaces top-level keys of a policy by Python values: `load("rkv", budget=512)`."""

from collections.abc import Mapping

import attrs

from kvpolicy.errors import shown
from kvpolicy.spec.tree import MAX_DEPTH, Item, Problems, SourcePosition, below

_POSITION = SourcePosition("override")


def override(root: Item, values: Mapping[str, object], problems: Problems) -> Item:
    """`root` with top-level keys replaced by `values`, as if they were written in the file."""
    if not isinstance(root.value, dict):
        return root
    items = {key: _item(value, key, problems) for key, value in values.items()}
    keys = {**root.keys, **dict.fromkeys(items, _POSITION)}
    return attrs.evolve(root, value={**root.value, **items}, keys=keys)


def _item(value: object, path: str, problems: Problems, depth: int = 1) -> Item:
    if depth > MAX_DEPTH:
        problems.add(_POSITION, path, f"must be nested at most {MAX_DEPTH} deep")
        return Item(None, _POSITION)
    if type(value) is dict:
        return _mapping(value, path, problems, depth)
    if isinstance(value, (list, tuple)):
        items = (_item(member, below(path, i), problems, depth + 1) for i, member in enumerate(value))
        return Item(tuple(items), _POSITION)
    if value is None or type(value) in (str, int, float, bool):
        return Item(value, _POSITION)  # type: ignore[arg-type]
    problems.add(_POSITION, path, f"must be plain data (dict, list, str, int, float, bool): {shown(value)}")
    return Item(None, _POSITION)


def _mapping(value: dict[object, object], path: str, problems: Problems, depth: int) -> Item:
    entries = {}
    for key, member in value.items():
        if type(key) is str:
            entries[key] = _item(member, below(path, key), problems, depth + 1)
        else:
            problems.add(_POSITION, path, f"must have text as its keys: {shown(key)}")
    return Item(entries, _POSITION, dict.fromkeys(entries, _POSITION))
