"""Python values in place of top-level keys: `load("rkv", budget=512)`."""

from collections.abc import Mapping

import attrs

from kvpolicy.errors import shown
from kvpolicy.spec.tree import MAX_DEPTH, Item, Place, Problems, below

_PLACE = Place("override")


def override(root: Item, values: Mapping[str, object], problems: Problems) -> Item:
    """`root` with its top-level keys replaced by `values`, as if they had been written there."""
    if not isinstance(root.value, dict):
        return root
    items = {key: _item(value, key, problems) for key, value in values.items()}
    keys = {**root.keys, **dict.fromkeys(items, _PLACE)}
    return attrs.evolve(root, value={**root.value, **items}, keys=keys)


def _item(value: object, path: str, problems: Problems, depth: int = 1) -> Item:
    if depth > MAX_DEPTH:
        problems.add(_PLACE, path, f"must be nested at most {MAX_DEPTH} deep")
        return Item(None, _PLACE)
    if type(value) is dict:
        return _mapping(value, path, problems, depth)
    if isinstance(value, (list, tuple)):
        parts = (_item(part, below(path, i), problems, depth + 1) for i, part in enumerate(value))
        return Item(tuple(parts), _PLACE)
    if value is None or type(value) in (str, int, float, bool):
        return Item(value, _PLACE)  # type: ignore[arg-type]
    problems.add(_PLACE, path, f"must be plain data (dict, list, str, int, float, bool): {shown(value)}")
    return Item(None, _PLACE)


def _mapping(value: dict[object, object], path: str, problems: Problems, depth: int) -> Item:
    entries = {}
    for key, part in value.items():
        if type(key) is str:
            entries[key] = _item(part, below(path, key), problems, depth + 1)
        else:
            problems.add(_PLACE, path, f"must have text as its keys: {shown(key)}")
    return Item(entries, _PLACE, dict.fromkeys(entries, _PLACE))
