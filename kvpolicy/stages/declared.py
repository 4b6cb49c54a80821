"""What plugins say of themselves, asked once when a plan is made and refused unless it makes sense.

A plugin of a third party may raise there, or give another type, a negative count or one beyond all memory. All of it
becomes a PluginContractError, which names the plugin and the method, before a model has been touched.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from kvpolicy.errors import KVPolicyError, described, one_line, shown
from kvpolicy.stages.checks import contract_error
from kvpolicy.stages.contracts import Codec, Merger, Needs, Observer, Plugin, Reader, Scorer, State
from kvpolicy.stages.formats import ALL, Column, Format, Formats, Site

MOST_OBSERVED = 2**16  # queries that a plugin may ask for: each is held, and weighed against every entry
_MOST_STATES = 64  # kinds of state of one plugin
_MOST_NUMBERS = 2**24  # that one slot, or one unit of slots, may hold under one name
_LARGEST_GROUP = 10**9  # entries
_LENGTHS = (0, 1, 2, 127, 128, 1000)  # of heads, tried on what a format says it packs


def needs_of(plugin: Observer) -> Needs:
    """`plugin.needs()`. Raises PluginContractError unless it gives sound counts."""
    found = _asked(plugin, "needs", plugin.needs)
    if not isinstance(found, Needs):
        raise contract_error(plugin, f"needs {shown(found)}, expected Needs")
    for name in ("queries", "forward_queries"):
        count = getattr(found, name)
        if type(count) is not int or not 0 <= count <= MOST_OBSERVED:
            raise contract_error(plugin, f"needs {name}={shown(count)}, expected 0 to {MOST_OBSERVED}")
    if type(found.attention) is not bool:
        raise contract_error(plugin, f"needs attention={shown(found.attention)}, expected true or false")
    return found


def slot_state_of(plugin: Observer) -> tuple[State, ...]:
    """`plugin.slot_state()`. Raises PluginContractError unless it gives states of different names."""
    return _states(plugin, "slot_state", plugin.slot_state)


def row_state_of(plugin: Merger) -> tuple[State, ...]:
    """`plugin.row_state()`. Raises PluginContractError unless it gives states of different names."""
    return _states(plugin, "row_state", plugin.row_state)


def any_order_of(plugin: Scorer) -> bool:
    """`plugin.in_any_order()`. Raises PluginContractError unless it says true or false."""
    return _flag(plugin, "in_any_order", _asked(plugin, "in_any_order", plugin.in_any_order))


def flag_of(plugin: Plugin, name: str) -> bool:
    """An attribute or a property that is true or false. Raises PluginContractError for anything else."""
    return _flag(plugin, name, _asked(plugin, name, lambda: getattr(plugin, name)))


def formats_of(codec: Codec, site: Site) -> Formats:
    """`codec.formats(site)`. Raises its ParameterError, or PluginContractError unless it gives sound formats."""
    found = _asked(codec, "formats", lambda: codec.formats(site))
    if not isinstance(found, Formats):
        raise contract_error(codec, f"gave {type(found).__name__}, expected Formats")
    for name, form in (("keys", found.keys), ("values", found.values)):
        _checked_format(codec, f"format of the {name}", form)
    return found


def pages_of(reader: Reader, site: Site) -> Format | None:
    """`reader.pages(site)`. Raises its ParameterError, or PluginContractError unless it is a sound format or None."""
    found = _asked(reader, "pages", lambda: reader.pages(site))
    return None if found is None else _checked_format(reader, "format of pages", found)


def _asked(plugin: Plugin, method: str, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except (KVPolicyError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise contract_error(plugin, f"raised in `{method}`: {described(error)}") from error


def _flag(plugin: Plugin, name: str, found: object) -> bool:
    if type(found) is not bool:
        raise contract_error(plugin, f"says {shown(found)} as `{name}`, expected true or false")
    return found


def _states(plugin: Plugin, method: str, ask: Callable[[], object]) -> tuple[State, ...]:
    found = _asked(plugin, method, ask)
    if type(found) is not tuple or len(found) > _MOST_STATES or not all(isinstance(one, State) for one in found):
        raise contract_error(
            plugin, f"gave {shown(found)} as `{method}`, expected a tuple of up to {_MOST_STATES} State"
        )
    names = [one.name for one in found]
    if not all(type(name) is str and name and name == one_line(name, 60) for name in names):
        raise contract_error(plugin, f"gave a name in `{method}` that is no word")
    if len(set(names)) < len(names):
        raise contract_error(plugin, f"declares {method.replace('_', ' ')} of the same name twice: {', '.join(names)}")
    wrong = [one.fill for one in found if type(one.fill) not in (int, float) or math.isnan(one.fill)]
    if wrong:
        raise contract_error(plugin, f"gave a fill in `{method}` that is no number: {shown(wrong[0])}")
    return found


def _checked_format(plugin: Plugin, what: str, form: object) -> Format:
    """The format, unless it is one with which storage could not be laid out."""
    if not isinstance(form, Format):
        raise contract_error(plugin, f"gave {shown(form)} as the {what}, expected a Format")
    parts = {name: _asked(plugin, name, partial(getattr, form, name)) for name in _PARTS}
    wrong = [name for name, sound in _PARTS.items() if not sound(parts[name])]
    if wrong:
        raise contract_error(plugin, f"gave a {what} whose `{wrong[0]}` is {shown(parts[wrong[0]])}")
    group, step, residual = parts["group_size"], parts["step"], parts["residual_length"]
    if step % group or (residual != ALL and residual % group):
        raise contract_error(
            plugin, f"gave a {what} whose group_size {group} does not divide step {step} and residual_length {residual}"
        )
    for length in _LENGTHS:
        packed = _asked(plugin, "packed_length", partial(form.packed_length, length))
        if type(packed) is not int or not 0 <= packed <= length or packed % group:
            raise contract_error(plugin, f"packs {shown(packed)} of {length} entries, expected whole groups of {group}")
    return form


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST_GROUP


def _are_columns(value: object) -> bool:
    if not isinstance(value, Mapping) or len(value) > _MOST_STATES:
        return False
    return all(type(name) is str and _is_column(column) for name, column in value.items())


def _is_column(column: object) -> bool:
    if not isinstance(column, Column) or type(column.shape) is not tuple or not isinstance(column.dtype, torch.dtype):
        return False
    sized = all(type(size) is int and 0 <= size <= _MOST_NUMBERS for size in column.shape)
    return sized and math.prod(column.shape) <= _MOST_NUMBERS and type(column.fill) in (int, float)


_PARTS: dict[str, Callable[[Any], bool]] = {
    "columns": _are_columns,
    "group_size": _is_count,
    "step": _is_count,
    "residual_length": lambda value: value == ALL or (type(value) is int and 0 <= value <= _LARGEST_GROUP),
    "joint": lambda value: type(value) is bool,
}
