"""Policies to YAML, and to digests that are equal for equal policies."""

import hashlib
import json
import re
from typing import Any

import attrs

from kvpolicy.spec.budget import Budget, Part
from kvpolicy.spec.policy import SCHEMA_VERSION, TERM_KEYS, PolicySpec, Weighted
from kvpolicy.spec.scalars import resolve
from kvpolicy.spec.structure import VERSION_KEY
from kvpolicy.stages.contracts import Plugin
from kvpolicy.stages.registry.plugins import registry

_HEAD = ("name", "summary", "reference", "budget", "compress", "protect")
_ORDER = (*_HEAD, "score", "allocate", "select", "merge", "store", "read")
_ALWAYS_WRITTEN = ("compress", "protect")  # even with default values: they control when entries are evicted
_READ_ALL = {"use": "all"}
_OPTIONAL_PROTECT = ("prompt", "regions")  # keys of `protect` that are written and hashed only when set
_BARE = re.compile(r"[A-Za-z]([A-Za-z0-9_. -]*[A-Za-z0-9_.-])?", re.ASCII)


def to_yaml(spec: PolicySpec) -> str:
    """The policy as YAML: top-level keys in a fixed order; parameters of plugins only if not at their default.

    Reading it gives an equal policy.
    """
    lines = []
    for key, value in plain(spec).items():
        if key == "score":
            lines += ["score:", *(f"  - {_flow(term)}" for term in value)]
        else:
            lines.append(f"{key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def plain(spec: PolicySpec) -> dict[str, Any]:
    """The content of `to_yaml` as dicts, lists and scalars."""
    data: dict[str, Any] = {VERSION_KEY: SCHEMA_VERSION}
    for key in _ORDER:
        value = getattr(spec, key)
        if value != getattr(attrs.fields(PolicySpec), key).default or key in _ALWAYS_WRITTEN:
            data[key] = _short(value)
    return data


def digest(spec: PolicySpec) -> str:
    """16 hex digits, equal exactly for equal policies, independent of how they were written."""
    data = {VERSION_KEY: SCHEMA_VERSION, **_full(spec)}
    if data["read"] == _READ_ALL:  # keeps the digests of policies written before readers existed
        del data["read"]
    for name in _OPTIONAL_PROTECT:
        if data["protect"][name] in (False, []):
            del data["protect"][name]
    return _hash(data)


def calibrated_digest(spec: PolicySpec) -> str:
    """16 hex digits of the plugins of a policy that must be calibrated: their keys, and what calibrations depend on."""
    return _hash({key: _measured_by(plugin) for key, plugin in spec.calibrated.items()})


def _measured_by(plugin: Plugin) -> dict[str, Any]:
    names, data = plugin.calibrated_by, _full(plugin)
    return {name: value for name, value in data.items() if names is None or name in (*names, "use")}


def _hash(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _full(value: Any) -> Any:
    """Plain data with all parameters; plugin names do not depend on which other plugins are installed."""
    if isinstance(value, (Budget, Part)):
        return value.dump()
    if isinstance(value, tuple):
        return [_full(member) for member in value]
    if not attrs.has(type(value)):
        return value
    fields = {name: _full(member) for name, member in _fields(value).items()}
    return {"use": registry().identity(type(value)), **fields} if isinstance(value, Plugin) else fields


def _short(value: Any) -> Any:
    """Plain data without default parameters; a plugin without parameters is its name alone."""
    if isinstance(value, (Budget, Part)):
        return value.dump()
    if isinstance(value, Weighted):
        term_keys = {key: getattr(value, key) for key in TERM_KEYS}
        if term_keys["normalise"] == "none":
            del term_keys["normalise"]
        return {**_plugin(value.scorer), **term_keys}
    if isinstance(value, Plugin):
        fields = _plugin(value)
        return fields if len(fields) > 1 else fields["use"]
    if isinstance(value, tuple):
        return [_short(member) for member in value]
    if not attrs.has(type(value)):
        return value
    written = {name: member for name, member in _fields(value).items() if name not in _OPTIONAL_PROTECT or member}
    return {name: _short(member) for name, member in written.items()}


def _plugin(plugin: Plugin) -> dict[str, Any]:
    plugin_class: Any = type(plugin)
    defaults = {field.name: field.default for field in attrs.fields(plugin_class)}
    changed = {name: _short(member) for name, member in _fields(plugin).items() if member != defaults[name]}
    return {"use": registry().reference(type(plugin)), **changed}


def _fields(value: Any) -> dict[str, Any]:
    fields = {field.name: getattr(value, field.name) for field in attrs.fields(type(value))}
    return {name: member for name, member in fields.items() if member is not None}  # an optional plugin that is not set


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {_flow(member)}" for key, member in value.items()) + "}"
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
