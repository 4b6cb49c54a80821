"""What a class must be before a policy may name it. Told by the class, not by running it."""

import inspect
import json
import re
from typing import Any

import attrs

from kvpolicy.errors import PluginError, described, one_line
from kvpolicy.stages.contracts import STAGES, Plugin, Scorer
from kvpolicy.stages.parameters import Nested, Plugged, Rule

_NAME = re.compile(r"[a-z][a-z0-9_]{0,59}", re.ASCII)
_FLAGS = ("ragged", "best", "moves_only", "votes", "reads_window")  # what a class may say of itself, or a property
_RESERVED = {"use"}  # the key that stands beside the parameters in a policy file
_RESERVED_IN_SCORERS = _RESERVED | {"weight", "normalise"}  # and those of a term of the score


@attrs.frozen
class _Frozen:
    """What attrs does to a frozen class."""


def admit(kind: object) -> type[Plugin]:
    """`kind`, if it is a plugin class that policies can name and set parameters of.

    Raises:
        PluginError: naming the class and the first rule that it breaks.
    """
    if not (inspect.isclass(kind) and issubclass(kind, Plugin)):
        raise PluginError(f"{one_line(kind, 100)}: must be a subclass of kvpolicy.stages.Plugin")
    for broken, rule in (
        (not _keeps_a_contract(kind), "must keep the contract of one stage: " + ", ".join(STAGES)),
        (inspect.isabstract(kind), f"must define {', '.join(sorted(kind.__abstractmethods__))}"),
        (not _has_name(kind), "must have a `name` in lower case, such as 'my_method'"),
        (not _is_frozen(kind), "must be decorated with @attrs.frozen: plugins hold no run state"),
        (not _has_texts(kind), "must have text as its docstring and its `reference`"),
        (not _has_flags(kind), f"must say true or false as {', '.join(_FLAGS)}, and name `stores` in a tuple"),
    ):
        if broken:
            raise PluginError(f"{_called(kind)}: {rule}")
    _check_parameters(kind, _RESERVED_IN_SCORERS if kind.stage == Scorer.stage else _RESERVED)
    return kind


def _keeps_a_contract(kind: type[Plugin]) -> bool:
    contract = STAGES.get(getattr(kind, "stage", ""))
    return contract is not None and issubclass(kind, contract)


def _has_name(kind: type[Plugin]) -> bool:
    name = getattr(kind, "name", None)
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def _has_texts(kind: type[Plugin]) -> bool:
    """Lists of plugins show both."""
    return isinstance(kind.__doc__, (str, type(None))) and type(getattr(kind, "reference", None)) is str


def _has_flags(kind: type[Plugin]) -> bool:
    flags = (getattr(kind, name, False) for name in _FLAGS)
    stores = getattr(kind, "stores", ())
    named = type(stores) is tuple and all(type(one) is str for one in stores)
    return named and all(type(flag) in (bool, property) for flag in flags)


def _called(kind: type) -> str:
    return one_line(f"{kind.__module__}.{kind.__qualname__}", 200)


def _is_frozen(kind: type) -> bool:
    refuses_to_set: object = _Frozen.__setattr__
    return "__attrs_attrs__" in vars(kind) and kind.__setattr__ is refuses_to_set


def _check_parameters(kind: type, reserved: set[str]) -> None:
    for field in attrs.fields(kind):
        problem = _parameter_problem(field, reserved)
        if problem:
            raise PluginError(f"{_called(kind)}.{field.name}: {problem}")
        rule = field.metadata["rule"]
        if isinstance(rule, Nested):
            _check_parameters(rule.kind, set())
        problem = _rule_problem(rule)
        if problem:
            raise PluginError(f"{_called(kind)}.{field.name}: {problem}")


def _parameter_problem(field: "attrs.Attribute[Any]", reserved: set[str]) -> str:
    if not isinstance(field.metadata.get("rule"), Rule):
        return "must be declared with kvpolicy.stages.parameter"
    if not _NAME.fullmatch(field.name) or field.name in reserved:
        return "must have a name in lower case, other than " + ", ".join(sorted(reserved))
    if type(field.metadata.get("help")) is not str:
        return "must have a line of help"
    return ""


def _rule_problem(rule: Rule) -> str:
    """What is wrong with a rule of a third party, as far as it is seen without a value."""
    if isinstance(rule, Plugged) and rule.stage not in STAGES:
        return f"must be of one stage: {', '.join(STAGES)}"
    try:
        text, schema = str(rule), rule.schema()
        json.dumps(schema, allow_nan=False)
    except Exception as error:  # noqa: BLE001 - a third party's code
        return f"has a rule that cannot be told: {described(error)}"
    return "" if isinstance(schema, dict) and text == one_line(text) else "has a rule that says more than one line"
