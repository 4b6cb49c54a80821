"""What plugins say of themselves, asked once when a plan is made and refused unless it makes sense.

A plugin of a third party may raise there, or give another type, a negative count or one beyond all memory. All of it
becomes a PluginContractError, which names the plugin and the method, before a model has been touched.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import KVPolicyError, described, one_line, shown
from kvpolicy.stages.checking.returned import contract_error
from kvpolicy.stages.contracts import (
    Codec,
    Merger,
    Needs,
    Observer,
    Plugin,
    Reader,
    Scorer,
    State,
    ViewPlugin,
)
from kvpolicy.stages.formats import ALL, Column, Format, Formats, Site
from kvpolicy.stages.prompt_passes import Pass, Prompt

MOST_OBSERVED = 2**16  # queries that a plugin may ask for: each is held, and weighed against every entry
_MOST_STATES = 64  # kinds of state of one plugin
_MOST_NUMBERS = 2**24  # that one slot, or one unit of slots, may hold under one name
_LARGEST_GROUP = 10**9  # entries
_MOST_PASSES = 2**16  # over one prompt
_LONGEST_PASS = 2**20  # tokens
_MOST_SPANS = 64  # of one pass
_LENGTHS = (0, 1, 2, 127, 128, 1000)  # of heads, tried on what a format says it packs


def needs_of(plugin: ViewPlugin) -> Needs:
    """`plugin.needs()`. Raises PluginContractError unless it gives sound counts."""
    needs = _asked(plugin, "needs", plugin.needs)
    if not isinstance(needs, Needs):
        raise contract_error(plugin, f"needs {shown(needs)}, expected Needs")
    for name in ("queries", "forward_queries", "chunk", "chunk_start"):
        count = getattr(needs, name)
        if type(count) is not int or not 0 <= count <= MOST_OBSERVED:
            raise contract_error(plugin, f"needs {name}={shown(count)}, expected 0 to {MOST_OBSERVED}")
    for name in ("attention", "passes", "rotary", "output_projection", "hidden_norms"):
        wanted = getattr(needs, name)
        if type(wanted) is not bool:
            raise contract_error(plugin, f"needs {name}={shown(wanted)}, expected true or false")
    for wrong, message in (
        (needs.passes and not isinstance(plugin, Scorer), "passes=true, which only a scorer can have"),
        (needs.hidden_norms and not needs.passes, "hidden_norms=true without passes=true: only passes show them"),
        (needs.chunk and not isinstance(plugin, Scorer), "chunk, which only a scorer can have"),
        (needs.chunk_start and not needs.chunk, "chunk_start without chunk: there is none to begin"),
        (
            needs.forward_queries and not isinstance(plugin, Observer),
            "forward_queries, which only a scorer or a merger can have",
        ),
    ):
        if wrong:
            raise contract_error(plugin, f"needs {message}")
    return needs


def slot_state_of(plugin: Observer) -> tuple[State, ...]:
    """`plugin.slot_state()`. Raises PluginContractError unless it gives states of different names."""
    return _states(plugin, "slot_state", plugin.slot_state)


def row_state_of(plugin: Merger) -> tuple[State, ...]:
    """`plugin.row_state()`. Raises PluginContractError unless it gives states of different names."""
    return _states(plugin, "row_state", plugin.row_state)


def reads_prompts(scorer: Scorer) -> bool:
    """Whether `scorer.passes` is to be asked. Raises PluginContractError where it could not remember a pass."""
    wanted = needs_of(scorer).passes
    if wanted and not slot_state_of(scorer):
        raise contract_error(scorer, "needs passes=true and declares no slot state, all that a pass can change")
    return wanted


def observes_chunks(scorer: Scorer) -> bool:
    """Whether `scorer.observe_chunk` is called. Raises PluginContractError where it could not remember a chunk."""
    size = needs_of(scorer).chunk
    if size and not slot_state_of(scorer):
        raise contract_error(scorer, f"needs chunk={size} and declares no slot state, all that a chunk can change")
    return size > 0


def passes_of(scorer: Scorer, prompt: Prompt) -> tuple[Pass, ...]:
    """`scorer.passes(prompt)`. Raises PluginContractError unless it gives sequences of token ids."""
    passes = _asked(scorer, "passes", lambda: scorer.passes(prompt))
    if (
        not isinstance(passes, Sequence)
        or len(passes) > _MOST_PASSES
        or not all(isinstance(own_pass, Pass) for own_pass in passes)
    ):
        raise contract_error(scorer, f"gave {shown(passes)} as `passes`, expected a list of up to {_MOST_PASSES} Pass")
    for own_pass in passes:
        _check_pass(scorer, own_pass, prompt.protected.shape[0])
    return tuple(passes)


def any_order_of(plugin: Scorer) -> bool:
    """`plugin.in_any_order()`. Raises PluginContractError unless it says true or false."""
    return _flag(plugin, "in_any_order", _asked(plugin, "in_any_order", plugin.in_any_order))


def flag_of(plugin: Plugin, name: str) -> bool:
    """An attribute or a property that is true or false. Raises PluginContractError for anything else."""
    return _flag(plugin, name, _asked(plugin, name, lambda: getattr(plugin, name)))


def formats_of(codec: Codec, site: Site) -> Formats:
    """`codec.formats(site)`. Raises its ParameterError, or PluginContractError unless it gives sound formats."""
    formats = _asked(codec, "formats", lambda: codec.formats(site))
    if not isinstance(formats, Formats):
        raise contract_error(codec, f"gave {type(formats).__name__}, expected Formats")
    for name, form in (("keys", formats.keys), ("values", formats.values)):
        _checked_format(codec, f"format of the {name}", form)
    return formats


def pages_of(reader: Reader, site: Site) -> Format | None:
    """`reader.pages(site)`. Raises its ParameterError, or PluginContractError unless it is a sound format or None."""
    pages = _asked(reader, "pages", lambda: reader.pages(site))
    return None if pages is None else _checked_format(reader, "format of pages", pages)


def _asked(plugin: Plugin, method: str, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except (KVPolicyError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise contract_error(plugin, f"raised in `{method}`: {described(error)}") from error


def _flag(plugin: Plugin, name: str, flag: object) -> bool:
    if type(flag) is not bool:
        raise contract_error(plugin, f"says {shown(flag)} as `{name}`, expected true or false")
    return flag


def _states(plugin: Plugin, method: str, ask: Callable[[], object]) -> tuple[State, ...]:
    states = _asked(plugin, method, ask)
    if type(states) is not tuple or len(states) > _MOST_STATES or not all(isinstance(state, State) for state in states):
        raise contract_error(
            plugin, f"gave {shown(states)} as `{method}`, expected a tuple of up to {_MOST_STATES} State"
        )
    names = [state.name for state in states]
    if not all(type(name) is str and name and name == one_line(name, 60) for name in names):
        raise contract_error(plugin, f"gave a name in `{method}` that is no word")
    if len(set(names)) < len(names):
        raise contract_error(plugin, f"declares {method.replace('_', ' ')} of the same name twice: {', '.join(names)}")
    wrong = [state.fill for state in states if type(state.fill) not in (int, float) or math.isnan(state.fill)]
    if wrong:
        raise contract_error(plugin, f"gave a fill in `{method}` that is no number: {shown(wrong[0])}")
    return states


def _check_pass(scorer: Scorer, own_pass: Pass, end: int) -> None:
    tokens, spans = own_pass.tokens, own_pass.spans
    sound = isinstance(tokens, Tensor) and tokens.dtype == torch.int64 and tokens.device.type == "cpu"
    if not sound or tokens.ndim != 1 or not 0 < tokens.shape[0] <= _LONGEST_PASS or bool((tokens < 0).any()):
        given = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else shown(tokens)
        raise contract_error(scorer, f"gave a pass of {given}, expected token ids, int64 [1 to {_LONGEST_PASS}] on cpu")
    if spans is None:
        return
    if type(spans) is not tuple or len(spans) > _MOST_SPANS or not all(_is_span(span, end) for span in spans):
        given = one_line(spans, 60)
        raise contract_error(
            scorer, f"gave a pass with spans {given}, expected up to {_MOST_SPANS} (start, stop) to {end}"
        )


def _is_span(span: object, end: int) -> bool:
    if type(span) is not tuple or len(span) != 2 or not all(type(number) is int for number in span):
        return False
    return bool(0 <= span[0] < span[1] <= end)


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
