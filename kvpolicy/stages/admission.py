"""What a class must be before a policy may name it. Told by the class, not by running it."""

import inspect
import re
from typing import Any

import attrs

from kvpolicy.errors import PluginError
from kvpolicy.stages.contracts import STAGES, Plugin, Scorer
from kvpolicy.stages.parameters import Nested, Rule

_NAME = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)
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
        raise PluginError(f"{kind!r}: must be a subclass of kvpolicy.stages.Plugin")
    for broken, rule in (
        (not _keeps_a_contract(kind), "must keep the contract of one stage: " + ", ".join(STAGES)),
        (inspect.isabstract(kind), f"must define {', '.join(sorted(kind.__abstractmethods__))}"),
        (not _has_name(kind), "must have a `name` in lower case, such as 'my_method'"),
        (not _is_frozen(kind), "must be decorated with @attrs.frozen: plugins hold no run state"),
    ):
        if broken:
            raise PluginError(f"{kind.__module__}.{kind.__qualname__}: {rule}")
    _check_parameters(kind, _RESERVED_IN_SCORERS if kind.stage == Scorer.stage else _RESERVED)
    return kind


def _keeps_a_contract(kind: type[Plugin]) -> bool:
    contract = STAGES.get(getattr(kind, "stage", ""))
    return contract is not None and issubclass(kind, contract)


def _has_name(kind: type[Plugin]) -> bool:
    name = getattr(kind, "name", None)
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def _is_frozen(kind: type) -> bool:
    refuses_to_set: object = _Frozen.__setattr__
    return "__attrs_attrs__" in vars(kind) and kind.__setattr__ is refuses_to_set


def _check_parameters(kind: type, reserved: set[str]) -> None:
    for field in attrs.fields(kind):
        problem = _parameter_problem(field, reserved)
        if problem:
            raise PluginError(f"{kind.__module__}.{kind.__qualname__}.{field.name}: {problem}")
        rule = field.metadata["rule"]
        if isinstance(rule, Nested):
            _check_parameters(rule.kind, set())


def _parameter_problem(field: "attrs.Attribute[Any]", reserved: set[str]) -> str:
    if not isinstance(field.metadata.get("rule"), Rule):
        return "must be declared with kvpolicy.stages.parameter"
    if not _NAME.fullmatch(field.name) or field.name in reserved:
        return "must have a name in lower case, other than " + ", ".join(sorted(reserved))
    return ""
