"""A policy back to YAML, and to a digest that tells whether two policies are the same."""

import hashlib
import json
import re
from typing import Any

import attrs

from kvpolicy.spec.budget import Budget, Part
from kvpolicy.spec.policy import BESIDE, SCHEMA_VERSION, PolicySpec, Weighted
from kvpolicy.spec.scalars import resolve
from kvpolicy.spec.structure import VERSION_KEY
from kvpolicy.stages.contracts import Plugin
from kvpolicy.stages.registry.plugins import registry

_HEAD = ("name", "summary", "reference", "budget", "compress", "protect")
_ORDER = (*_HEAD, "score", "allocate", "select", "merge", "store", "read")
_ALWAYS = ("compress", "protect")  # at their defaults too: they say what will happen
_READ_ALL = {"use": "all"}
_LATER = ("prompt", "regions")  # keys of `protect` that are written, and enter a digest, where they say something
_BARE = re.compile(r"[A-Za-z]([A-Za-z0-9_. -]*[A-Za-z0-9_.-])?", re.ASCII)


def to_yaml(spec: PolicySpec) -> str:
    """The policy as a file: every top-level key, in one order; plugins without what is at its default.

    Reading it back gives an equal policy.
    """
    lines = []
    for key, value in plain(spec).items():
        if key == "score":
            lines += ["score:", *(f"  - {_flow(one)}" for one in value)]
        else:
            lines.append(f"{key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def plain(spec: PolicySpec) -> dict[str, Any]:
    """What `to_yaml` writes, as dicts, lists and scalars."""
    data: dict[str, Any] = {VERSION_KEY: SCHEMA_VERSION}
    for key in _ORDER:
        value = getattr(spec, key)
        if value != getattr(attrs.fields(PolicySpec), key).default or key in _ALWAYS:
            data[key] = _short(value)
    return data


def digest(spec: PolicySpec) -> str:
    """16 hex digits, the same for equal policies only, however they were written."""
    data = {VERSION_KEY: SCHEMA_VERSION, **_full(spec)}
    if data["read"] == _READ_ALL:  # policies from before there were readers keep their digests
        del data["read"]
    for name in _LATER:
        if data["protect"][name] in (False, []):
            del data["protect"][name]
    return _hash(data)


def plugin_digest(plugin: Plugin) -> str:
    """The same for one plugin with its parameters."""
    return _hash(_full(plugin))


def _hash(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _full(value: Any) -> Any:
    """Plain data with every parameter; plugins by names that do not depend on what else is installed."""
    if isinstance(value, (Budget, Part)):
        return value.dump()
    if isinstance(value, tuple):
        return [_full(part) for part in value]
    if not attrs.has(type(value)):
        return value
    parts = {name: _full(part) for name, part in _fields(value).items()}
    return {"use": registry().identity(type(value)), **parts} if isinstance(value, Plugin) else parts


def _short(value: Any) -> Any:
    """Plain data for a reader: a plugin without its defaults, and as a word where nothing is left."""
    if isinstance(value, (Budget, Part)):
        return value.dump()
    if isinstance(value, Weighted):
        beside = {key: getattr(value, key) for key in BESIDE}
        if beside["normalise"] == "none":
            del beside["normalise"]
        return {**_plugin(value.scorer), **beside}
    if isinstance(value, Plugin):
        named = _plugin(value)
        return named if len(named) > 1 else named["use"]
    if isinstance(value, tuple):
        return [_short(part) for part in value]
    if not attrs.has(type(value)):
        return value
    said = {name: part for name, part in _fields(value).items() if name not in _LATER or part}
    return {name: _short(part) for name, part in said.items()}


def _plugin(plugin: Plugin) -> dict[str, Any]:
    kind: Any = type(plugin)
    defaults = {field.name: field.default for field in attrs.fields(kind)}
    changed = {name: _short(part) for name, part in _fields(plugin).items() if part != defaults[name]}
    return {"use": registry().reference(type(plugin)), **changed}


def _fields(value: Any) -> dict[str, Any]:
    fields = {field.name: getattr(value, field.name) for field in attrs.fields(type(value))}
    return {name: part for name, part in fields.items() if part is not None}  # an optional plugin that is not there


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {_flow(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _text(value) if isinstance(value, str) else repr(value)


def _text(text: str) -> str:
    bare = _BARE.fullmatch(text) and resolve(text) == text
    return text if bare else '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08x}"
