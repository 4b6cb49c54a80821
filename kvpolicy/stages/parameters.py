"""Parameters of plugins and policies. One rule validates them in Python, in YAML and, as JSON Schema, in editors."""

import abc
import math
import re
from typing import Any

import attrs

from kvpolicy.errors import ParameterError, one_line, shown

BEYOND = 10**18  # integers of policy files have at most 18 digits; the same limit holds in Python
LARGEST = 10**9  # default bound: more tokens than any sequence has, and sums fit into 64 bits
_REQUIRED = attrs.NOTHING
# control characters would garble reports; unpaired surrogates cannot be encoded
_FORBIDDEN = r"[\u0000-\u001f\u007f-\u009f\u2028\u2029\ud800-\udfff]"


class Rule(abc.ABC):
    """A rule for the values of a parameter, and its attrs validator. `str(rule)` completes "must be ...".

    Rules test `type(x) is int` rather than `isinstance`, because `True` is not an integer in a policy file.
    """

    @abc.abstractmethod
    def accepts(self, value: object) -> bool:
        """Whether `value` satisfies the rule."""

    @abc.abstractmethod
    def schema(self) -> dict[str, Any]:
        """The rule as JSON Schema (draft 2020-12)."""

    def convert(self, value: Any) -> Any:
        """`value` in its canonical form: equal values must have the same form, because digests depend on it."""
        return value

    def __call__(self, _instance: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
        if not self.accepts(value):
            raise ParameterError(f"{attribute.name}: must be {one_line(self)}: {shown(value)}")


@attrs.frozen
class Integer(Rule):
    """An integer between two bounds, optionally odd.

    The default bounds are -`LARGEST` and `LARGEST`. Set tighter ones where memory or time grows with the
    number.
    """

    minimum: int = -LARGEST
    maximum: int = LARGEST
    odd: bool = False

    def __attrs_post_init__(self) -> None:
        _check_bounds(self.minimum, self.maximum)

    def accepts(self, value: object) -> bool:
        if type(value) is not int or (self.odd and value % 2 == 0):
            return False
        return abs(value) < BEYOND and self.minimum <= value <= self.maximum

    def schema(self) -> dict[str, Any]:
        odd = {"not": {"multipleOf": 2}} if self.odd else {}
        return {"type": "integer", "minimum": self.minimum, "maximum": self.maximum, **odd}

    def __str__(self) -> str:
        return f"an {'odd ' if self.odd else ''}integer from {self.minimum} to {self.maximum}"


@attrs.frozen
class Number(Rule):
    """A finite number between two bounds; `above` is an exclusive lower bound.

    The default bounds are -`LARGEST` and `LARGEST`: products of such numbers are finite in float32.
    """

    minimum: float = -float(LARGEST)
    maximum: float = float(LARGEST)
    above: float | None = None

    def __attrs_post_init__(self) -> None:
        _check_bounds(self.minimum if self.above is None else self.above, self.maximum)

    def accepts(self, value: object) -> bool:
        number = self.convert(value)
        if type(number) is not float or not math.isfinite(number):
            return False
        return self.minimum <= number <= self.maximum and (self.above is None or number > self.above)

    def schema(self) -> dict[str, Any]:
        lower = {"minimum": self.minimum} if self.above is None else {"exclusiveMinimum": self.above}
        return {"type": "number", **lower, "maximum": self.maximum}

    def convert(self, value: Any) -> Any:
        if type(value) not in (int, float):
            return value
        try:
            return float(value) + 0.0  # -0.0 becomes 0.0
        except OverflowError:
            return math.inf

    def __str__(self) -> str:
        lower = f"from {self.minimum:g} to" if self.above is None else f"above {self.above:g}, up to"
        return f"a number {lower} {self.maximum:g}"


@attrs.frozen
class Choice(Rule):
    """One of several words or integers."""

    words: tuple[str | int, ...]

    def accepts(self, value: object) -> bool:
        return any(type(value) is type(word) and value == word for word in self.words)

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.words)}

    def __str__(self) -> str:
        return "one of " + ", ".join(map(str, self.words))


@attrs.frozen
class Flag(Rule):
    """`true` or `false`."""

    def accepts(self, value: object) -> bool:
        return type(value) is bool

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}

    def __str__(self) -> str:
        return "true or false"


@attrs.frozen
class Text(Rule):
    """A line of text, of `shortest` to `longest` characters."""

    longest: int = 1000
    shortest: int = 0

    def accepts(self, value: object) -> bool:
        if type(value) is not str or re.search(_FORBIDDEN, value) is not None:
            return False
        return self.shortest <= len(value) <= self.longest

    def schema(self) -> dict[str, Any]:
        shortest = {"minLength": self.shortest} if self.shortest else {}
        return {"type": "string", **shortest, "maxLength": self.longest, "not": {"pattern": _FORBIDDEN}}

    def __str__(self) -> str:
        shortest = f"{self.shortest} to " if self.shortest else ""
        return f"a line of text, {shortest}{self.longest} characters{'' if shortest else ' at most'}"


@attrs.frozen
class Nested(Rule):
    """A mapping with its own parameters, which are fields of the attrs class `kind`."""

    kind: type

    def accepts(self, value: object) -> bool:
        return isinstance(value, self.kind)

    def schema(self) -> dict[str, Any]:
        return object_schema(self.kind)

    def __str__(self) -> str:
        return "a mapping with " + ", ".join(field.name for field in attrs.fields(self.kind))


@attrs.frozen
class Plugged(Rule):
    """A plugin of `stage` (`score`, `select`, …): a scorer may use another scorer.

    `default` is the name of the plugin if the key is absent; with `optional` there may be none.
    """

    stage: str
    default: str = ""
    optional: bool = False

    def accepts(self, value: object) -> bool:
        return (self.optional and value is None) or getattr(value, "stage", None) == self.stage

    def schema(self) -> dict[str, Any]:
        return {"$ref": f"#/$defs/{self.stage}"}

    def __str__(self) -> str:
        return f"a plugin of the stage {self.stage!r}"


def parameter(rule: Rule, default: Any = _REQUIRED, *, help: str) -> Any:
    """An attrs field with a rule; required if it has no default. `help` is one line for the documentation."""
    return attrs.field(default=default, converter=rule.convert, validator=rule, metadata={"rule": rule, "help": help})


def rule_of(field: "attrs.Attribute[Any]") -> Rule:
    """The rule of an attrs field made by `parameter`."""
    rule = field.metadata["rule"]
    if not isinstance(rule, Rule):
        raise ParameterError(f"{field.name}: must be declared with kvpolicy.stages.parameter")
    return rule


def object_schema(attrs_class: type) -> dict[str, Any]:
    """JSON Schema of a mapping whose keys are the parameters of an attrs class."""
    fields = attrs.fields(attrs_class)
    return {
        "type": "object",
        "properties": {field.name: _property(field) for field in fields},
        "required": [field.name for field in fields if is_required(field)],
        "additionalProperties": False,
    }


def is_required(field: "attrs.Attribute[Any]") -> bool:
    """Whether the parameter is required in a policy file."""
    rule = rule_of(field)
    if field.default is not attrs.NOTHING or (isinstance(rule, Plugged) and rule.default):
        return False
    return not (isinstance(rule, Nested) and not any(map(is_required, attrs.fields(rule.kind))))


def _property(field: "attrs.Attribute[Any]") -> dict[str, Any]:
    rule = rule_of(field)
    schema = {**rule.schema(), "description": field.metadata["help"]}
    if isinstance(rule, Plugged) and rule.default:
        schema["default"] = rule.default
    if isinstance(field.default, (bool, int, float, str)):
        schema["default"] = field.default
    return schema


def _check_bounds(minimum: object, maximum: object) -> None:
    if not (isinstance(minimum, (int, float)) and isinstance(maximum, (int, float)) and minimum <= maximum):
        raise ParameterError(f"a rule must have a minimum <= its maximum: from {minimum} to {maximum}")
