"""Checks that a policy built in Python is within the limits of policy files."""

from typing import TYPE_CHECKING, Any

import attrs

from kvpolicy.errors import ParameterError
from kvpolicy.spec.tree import MAX_BYTES, MAX_DEPTH, MAX_EVENTS

if TYPE_CHECKING:
    from kvpolicy.spec.policy import PolicySpec

_DOCUMENT_EVENTS = 8  # YAML events of the version and of the document itself


def check_writable(spec: "PolicySpec") -> None:
    """Check the limits of the policy file reader.

    Raises:
        ParameterError: names the limit that is exceeded, and the actual number.
    """
    from kvpolicy.spec.dump import plain, to_yaml  # noqa: PLC0415 - circular import

    if _deeper(spec, MAX_DEPTH):
        raise ParameterError(f"a policy must be nested at most {MAX_DEPTH} deep, as in a file")
    data = plain(spec)
    depth, events = _depth(data), _DOCUMENT_EVENTS + _events(data)
    if depth > MAX_DEPTH:
        raise ParameterError(f"a policy must be nested at most {MAX_DEPTH} deep, as in a file: {depth}")
    if events > MAX_EVENTS:
        raise ParameterError(f"a policy must have at most {MAX_EVENTS} keys and values, as in a file: {events}")
    size = len(to_yaml(spec).encode())
    if size > MAX_BYTES:
        raise ParameterError(f"a policy must take at most {MAX_BYTES // 1024} KiB, as in a file: {size} bytes")


def _deeper(value: object, limit: int) -> bool:
    """Whether parameters are nested more than `limit` deep; looks no deeper than that."""
    if isinstance(value, tuple):
        return limit <= 0 or any(_deeper(member, limit - 1) for member in value)
    attrs_class: Any = type(value)
    if not attrs.has(attrs_class):
        return False
    return limit <= 0 or any(_deeper(getattr(value, field.name), limit - 1) for field in attrs.fields(attrs_class))


def _events(data: Any) -> int:
    """Number of YAML events: one for a scalar or a key, two for a list or a mapping."""
    if isinstance(data, dict):
        return 2 + sum(1 + _events(member) for member in data.values())
    return 2 + sum(map(_events, data)) if isinstance(data, list) else 1


def _depth(data: Any) -> int:
    if isinstance(data, dict):
        return 1 + max(map(_depth, data.values()), default=0)
    return 1 + max(map(_depth, data), default=0) if isinstance(data, list) else 0
