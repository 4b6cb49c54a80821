"""Whether a policy can be written as a file that can be read again: the reader has limits, whoever made the policy."""

from typing import TYPE_CHECKING, Any

import attrs

from kvpolicy.errors import ParameterError
from kvpolicy.spec.tree import MAX_BYTES, MAX_DEPTH, MAX_EVENTS

if TYPE_CHECKING:
    from kvpolicy.spec.policy import PolicySpec

_AROUND = 8  # events for the version, and for the document itself


def check_writable(spec: "PolicySpec") -> None:
    """Refuses what the reader of policy files would refuse, were it written there.

    Raises:
        ParameterError: naming the limit that the policy is beyond, and by how much.
    """
    from kvpolicy.spec.dump import plain, to_yaml  # noqa: PLC0415 - which knows policies, and these ask us

    if _deeper(spec, MAX_DEPTH):
        raise ParameterError(f"a policy must be nested at most {MAX_DEPTH} deep, as in a file")
    data = plain(spec)
    depth, events = _depth(data), _AROUND + _events(data)
    if depth > MAX_DEPTH:
        raise ParameterError(f"a policy must be nested at most {MAX_DEPTH} deep, as in a file: {depth}")
    if events > MAX_EVENTS:
        raise ParameterError(f"a policy must have at most {MAX_EVENTS} keys and values, as in a file: {events}")
    size = len(to_yaml(spec).encode())
    if size > MAX_BYTES:
        raise ParameterError(f"a policy must take at most {MAX_BYTES // 1024} KiB, as in a file: {size} bytes")


def _deeper(value: object, most: int) -> bool:
    """Whether parameters are nested more than `most` deep; looks no deeper than that."""
    if isinstance(value, tuple):
        return most <= 0 or any(_deeper(part, most - 1) for part in value)
    kind: Any = type(value)
    if not attrs.has(kind):
        return False
    return most <= 0 or any(_deeper(getattr(value, one.name), most - 1) for one in attrs.fields(kind))


def _events(data: Any) -> int:
    """Events of YAML: one for a scalar or a key, two around a list or a mapping."""
    if isinstance(data, dict):
        return 2 + sum(1 + _events(part) for part in data.values())
    return 2 + sum(map(_events, data)) if isinstance(data, list) else 1


def _depth(data: Any) -> int:
    if isinstance(data, dict):
        return 1 + max(map(_depth, data.values()), default=0)
    return 1 + max(map(_depth, data), default=0) if isinstance(data, list) else 0
