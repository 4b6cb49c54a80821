"""Items to a `PolicySpec`: walks the rules of the attrs classes, built-in and third-party alike.

Nothing here knows a plugin. What is wrong is collected, so that one run shows all of it; a value that is
wrong becomes `INVALID`, and so does all that contains it.
"""

from typing import Any, Final

import attrs

from kvpolicy.errors import ParameterError, PluginError, described, did_you_mean, one_line, shown
from kvpolicy.spec.policy import BESIDE, MOST_SCORERS, SCHEMA_VERSION, PolicySpec, ScoreRule, Weighted
from kvpolicy.spec.tree import MAX_DEPTH, Item, Problems, below
from kvpolicy.stages.contracts import Plugin
from kvpolicy.stages.parameters import Nested, Plugged, Rule, is_required, rule_of
from kvpolicy.stages.registry.hooks import PROJECT
from kvpolicy.stages.registry.plugins import registry

VERSION_KEY = "kvpolicy"
INVALID: Final[Any] = object()


def structure(root: Item, default_name: str, problems: Problems) -> PolicySpec | None:
    """The policy that `root` describes; None after a problem. Without a name it gets `default_name`."""
    if not isinstance(root.value, dict):
        message = f"must be a mapping with kvpolicy, budget and score: {shown(root.plain)}"
        problems.add(root.place, "", message)
        return None
    _check_version(root, problems)
    entries = {"name": Item(default_name, root.place), **root.value}
    entries.pop(VERSION_KEY, None)
    spec = _object(attrs.evolve(root, value=entries), PolicySpec, "", problems, beside=(VERSION_KEY,))
    return None if spec is INVALID else spec


def _check_version(root: Item, problems: Problems) -> None:
    version = dict(root.mapping()).get(VERSION_KEY)
    if version is None:
        message = f"must be given, as the first line: {VERSION_KEY}: {SCHEMA_VERSION}"
        problems.add(root.place, VERSION_KEY, message)
    elif type(version.value) is not int or version.value != SCHEMA_VERSION:
        message = f"must be {SCHEMA_VERSION}, the version of policy files: {shown(version.plain)}"
        problems.add(version.place, VERSION_KEY, message)


def _value(item: Item, rule: Rule, path: str, problems: Problems) -> Any:
    if isinstance(rule, Plugged):
        return _plugin(item, rule.stage, path, problems)
    if isinstance(rule, ScoreRule):
        return _score(item, rule, path, problems)
    if isinstance(rule, Nested):
        if not isinstance(item.value, dict):
            problems.add(item.place, path, f"must be {rule}: {shown(item.plain)}")
            return INVALID
        return _object(item, rule.kind, path, problems)
    try:
        value = rule.convert(item.plain)
        accepted = rule.accepts(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a third party's rule, given a value that it did not expect
        problems.add(item.place, path, f"must be {one_line(rule)}: {shown(item.plain)}", error)
        return INVALID
    if not accepted:
        problems.add(item.place, path, f"must be {one_line(rule)}: {shown(item.plain)}")
    return value if accepted else INVALID


def _object(item: Item, kind: type, path: str, problems: Problems, beside: tuple[str, ...] = ()) -> Any:
    """An instance of the attrs class `kind`; `beside` are keys that the caller took out of the mapping."""
    fields = {field.name: field for field in attrs.fields(kind)}
    entries = dict(item.mapping())
    unknown = [key for key in entries if key not in fields]
    for key in unknown:
        message = f"unknown key{did_you_mean(key, [*beside, *fields], 'known')}"
        problems.add(item.keys.get(key, item.place), below(path, key), message)
    values = {}
    for name, field in fields.items():
        if name in entries:
            values[name] = _value(entries[name], rule_of(field), below(path, name), problems)
        elif field.default is attrs.NOTHING:
            values[name] = _left_out(item, field, below(path, name), problems)
    if unknown or any(value is INVALID for value in values.values()):
        return INVALID
    return _built(item, kind, values, path, problems)


def _left_out(item: Item, field: "attrs.Attribute[Any]", path: str, problems: Problems) -> Any:
    rule = rule_of(field)
    if is_required(field):
        problems.add(item.place, path, f"must be given: {rule}")
        return INVALID
    if isinstance(rule, Plugged):  # nobody wrote the name: another plugin that has it, too, must not come between
        return _plugin(Item(rule.default, attrs.evolve(item.place, home=PROJECT)), rule.stage, path, problems)
    return _value(Item({}, item.place), rule, path, problems)


def _built(item: Item, kind: type, values: dict[str, Any], path: str, problems: Problems) -> Any:
    try:
        return kind(**values)
    except ParameterError as error:  # a rule between parameters, checked by the class itself
        problems.add(item.place, path, one_line(error), error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a third party's class must not end the reading of a file
        problems.add(item.place, path, f"{one_line(kind.__qualname__, 60)} failed: {described(error)}", error)
    return INVALID


def _plugin(item: Item, stage: str, path: str, problems: Problems, beside: tuple[str, ...] = ()) -> Plugin | Any:
    """A plugin, written as a word or as a mapping with `use`."""
    if path.count(".") > MAX_DEPTH:  # a default may lead to itself, without an end
        problems.add(item.place, path, f"must be nested at most {MAX_DEPTH} deep")
        return INVALID
    kind = _kind(item, stage, path, problems)
    if kind is INVALID:
        return INVALID
    entries = {key: value for key, value in item.mapping() if key != "use"}
    return _object(attrs.evolve(item, value=entries), kind, path, problems, ("use", *beside))


def _kind(item: Item, stage: str, path: str, problems: Problems) -> type[Plugin] | Any:
    named = item
    if isinstance(item.value, dict):
        if "use" not in item.value:
            problems.add(item.place, below(path, "use"), f"must be given: a plugin of the stage {stage!r}")
            return INVALID
        named, path = item.value["use"], below(path, "use")
    if not isinstance(named.value, str):
        form = "" if named is not item else ", or a mapping with `use`"
        problems.add(named.place, path, f"must be the name of a plugin{form}: {shown(named.plain)}")
        return INVALID
    try:
        return registry().find(stage, named.value, named.place.home)
    except PluginError as error:
        problems.add(named.place, path, str(error), error)
        return INVALID


def _score(item: Item, rule: Rule, path: str, problems: Problems) -> Any:
    if not isinstance(item.value, tuple) or not 1 <= len(item.value) <= MOST_SCORERS:
        problems.add(item.place, path, f"must be {rule}: {shown(item.plain)}")
        return INVALID
    parts = [_weighted(part, below(path, number), problems) for number, part in enumerate(item.value)]
    return INVALID if any(part is INVALID for part in parts) else tuple(parts)


def _weighted(item: Item, path: str, problems: Problems) -> Any:
    """A scorer with its weight: keys of `Weighted` stand beside `use` and the scorer's own parameters."""
    keys = {key for key, _ in item.mapping()}
    scorer = _plugin(item.only(keys - set(BESIDE)), "score", path, problems, BESIDE)
    values = {}
    for field in attrs.fields(Weighted):
        if field.name in keys & set(BESIDE):
            value = dict(item.mapping())[field.name]
            values[field.name] = _value(value, rule_of(field), below(path, field.name), problems)
    if scorer is INVALID or any(value is INVALID for value in values.values()):
        return INVALID
    return _built(item, Weighted, {"scorer": scorer, **values}, path, problems)
