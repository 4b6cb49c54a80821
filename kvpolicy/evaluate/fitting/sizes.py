"""Scales the sizes of plugins, meant for thousands of tokens, down to budgets of about a hundred."""

from typing import Any, TypeVar

import attrs

from kvpolicy.stages import Codec, Reader, ViewPlugin

FEWEST_QUERIES = 4

_T = TypeVar("_T", bound=ViewPlugin)


def observing_less(plugin: _T, tokens: int) -> _T:
    """A scorer, selector or merger, and those it is built on, with at most a twelfth of `tokens` in observed queries.

    Never fewer than 4, nor more than its own; 0, which stands for all that are observed anyway, stays.
    """
    shrunk: Any = plugin  # attrs does not know that every plugin is one of its classes
    changes: dict[str, Any] = {}
    for field in attrs.fields(type(shrunk)):
        value = getattr(shrunk, field.name)
        if isinstance(value, ViewPlugin):
            changes[field.name] = observing_less(value, tokens)
        elif field.name in ("queries", "window") and isinstance(value, int):
            changes[field.name] = min(value, max(FEWEST_QUERIES, tokens // 12))
    fewer: _T = attrs.evolve(shrunk, **changes)
    return fewer


def packing_sooner(store: Codec, tokens: int) -> Codec:
    """A store that leaves at most an eighth of `tokens` unpacked, in whole groups, and at least one group."""
    own, step = unpacked(store), unpacked_step(store)
    return with_unpacked(store, min(own, max(step, tokens // 8 // step * step))) if own else store


def unpacked(store: Codec) -> int:
    """How many of the newest entries a store leaves unpacked; 0 if it has no such parameter."""
    return int(getattr(store, "residual", 0))


def unpacked_step(store: Codec) -> int:
    """What that number is a multiple of; 0 if a store has no such parameter."""
    return (getattr(store, "group", 0) or 1) if hasattr(store, "residual") else 0


def with_unpacked(store: Codec, entries: int) -> Codec:
    """The store with another number of entries left unpacked."""
    resized: Any = store
    other: Codec = attrs.evolve(resized, residual=entries)
    return other


def reading(reader: Reader, tokens: int, layers: int) -> Reader:
    """A reader that reads `tokens` entries, of a model with so many layers.

    Of a reader with `critical` entries the sinks are at most an eighth of these and the recent ones at most a quarter.
    Layers that read everything are at most an eighth of all, and never more than its own.
    """
    resized: Any = reader
    own = {field.name: getattr(resized, field.name) for field in attrs.fields(type(resized))}
    changes = {name: min(own[name], layers // 8) for name in ("dense_first", "dense_last") if name in own}
    if "budget" in own:
        changes["budget"] = max(tokens, own.get("page", 1))
    if "critical" in own:
        parts = {"sinks": tokens // 8, "recent": tokens // 4}
        fixed = {name: min(own[name], most) for name, most in parts.items() if name in own}
        changes |= fixed | {"critical": max(1, tokens - sum(fixed.values()))}
    other: Reader = attrs.evolve(resized, **changes)
    return other


def reads(reader: Reader) -> int:
    """Entries that a reader reads at most, 0 when its parameters do not say."""
    return sum(int(getattr(reader, name, 0)) for name in ("budget", "critical", "sinks", "recent"))
