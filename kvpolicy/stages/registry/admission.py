"""Checks that a class is a plugin that policies can use. Plugins are inspected, not run."""

import inspect
import json
import re
from typing import Any

import attrs

from kvpolicy.errors import PluginError, described, one_line
from kvpolicy.stages.contracts import STAGES, Plugin, Scorer
from kvpolicy.stages.parameters import Nested, Plugged, Rule

_NAME = re.compile(r"[a-z][a-z0-9_]{0,59}", re.ASCII)
_FLAGS = (
    "ragged",
    "best",
    "moves_only",
    "votes",
    "reads_window",
    "summarises_newest",
)  # attributes or properties of a plugin class
_RESERVED = {"use"}  # a key of the same mapping as the parameters in a policy file
_RESERVED_IN_SCORERS = _RESERVED | {"weight", "normalise"}  # and the keys of a term of the score


@attrs.frozen
class _Frozen:
    """A frozen class, to compare `__setattr__` with."""


def admit(candidate: object) -> type[Plugin]:
    """Return `candidate` if it is a plugin class that policies can name and set parameters of.

    Raises:
        PluginError: names the class and the first rule that it violates.
    """
    if not (inspect.isclass(candidate) and issubclass(candidate, Plugin)):
        raise PluginError(f"{one_line(candidate, 100)}: must be a subclass of kvpolicy.stages.Plugin")
    for broken, rule in (
        (not _keeps_a_contract(candidate), "must subclass the contract of one stage: " + ", ".join(STAGES)),
        (inspect.isabstract(candidate), f"must define {', '.join(sorted(candidate.__abstractmethods__))}"),
        (not _has_name(candidate), "must have a `name` in lower case, such as 'my_method'"),
        (not _is_frozen(candidate), "must be decorated with @attrs.frozen: plugins have no run state"),
        (not _has_texts(candidate), "must have text as its docstring and its `reference`"),
        (not _has_flags(candidate), f"must have bools as {', '.join(_FLAGS)}, and a tuple of names as `stores`"),
    ):
        if broken:
            raise PluginError(f"{_qualified_name(candidate)}: {rule}")
    _check_parameters(candidate, _RESERVED_IN_SCORERS if candidate.stage == Scorer.stage else _RESERVED)
    return candidate


def _keeps_a_contract(plugin_class: type[Plugin]) -> bool:
    contract = STAGES.get(getattr(plugin_class, "stage", ""))
    return contract is not None and issubclass(plugin_class, contract)


def _has_name(plugin_class: type[Plugin]) -> bool:
    name = getattr(plugin_class, "name", None)
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def _has_texts(plugin_class: type[Plugin]) -> bool:
    """Both are shown in lists of plugins."""
    return isinstance(plugin_class.__doc__, (str, type(None))) and type(getattr(plugin_class, "reference", None)) is str


def _has_flags(plugin_class: type[Plugin]) -> bool:
    flags = (getattr(plugin_class, name, False) for name in _FLAGS)
    stores = getattr(plugin_class, "stores", ())
    named = type(stores) is tuple and all(type(store) is str for store in stores)
    return named and all(type(flag) in (bool, property) for flag in flags)


def _qualified_name(attrs_class: type) -> str:
    return one_line(f"{attrs_class.__module__}.{attrs_class.__qualname__}", 200)


def _is_frozen(plugin_class: type) -> bool:
    refuses_to_set: object = _Frozen.__setattr__
    return "__attrs_attrs__" in vars(plugin_class) and plugin_class.__setattr__ is refuses_to_set


def _check_parameters(attrs_class: type, reserved: set[str]) -> None:
    for field in attrs.fields(attrs_class):
        problem = _parameter_problem(field, reserved)
        if problem:
            raise PluginError(f"{_qualified_name(attrs_class)}.{field.name}: {problem}")
        rule = field.metadata["rule"]
        if isinstance(rule, Nested):
            _check_parameters(rule.kind, set())
        problem = _rule_problem(rule)
        if problem:
            raise PluginError(f"{_qualified_name(attrs_class)}.{field.name}: {problem}")


def _parameter_problem(field: "attrs.Attribute[Any]", reserved: set[str]) -> str:
    if not isinstance(field.metadata.get("rule"), Rule):
        return "must be declared with kvpolicy.stages.parameter"
    if not _NAME.fullmatch(field.name) or field.name in reserved:
        return "must have a name in lower case, other than " + ", ".join(sorted(reserved))
    if type(field.metadata.get("help")) is not str:
        return "must have a line of help"
    return ""


def _rule_problem(rule: Rule) -> str:
    """The error in a rule of a third party, empty if there is none; checked without a value."""
    if isinstance(rule, Plugged) and rule.stage not in STAGES:
        return f"must be of one stage: {', '.join(STAGES)}"
    try:
        text, schema = str(rule), rule.schema()
        json.dumps(schema, allow_nan=False)
    except Exception as error:  # noqa: BLE001 - a third party's code
        return f"has a rule that cannot be described: {described(error)}"
    return (
        "" if isinstance(schema, dict) and text == one_line(text) else "has a rule whose text is longer than one line"
    )
