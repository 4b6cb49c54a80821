"""Builds a `PolicySpec` from items, by the rules of the attrs classes of policies and plugins.

All errors are collected, so that one run reports all of them. An invalid value becomes `INVALID`, and so does
everything that contains it.
"""

from typing import Any, Final

import attrs

from kvpolicy.errors import ParameterError, PluginError, described, did_you_mean, one_line, shown
from kvpolicy.spec.policy import MAX_SCORERS, SCHEMA_VERSION, TERM_KEYS, PolicySpec, ScoreRule, Weighted
from kvpolicy.spec.tree import MAX_DEPTH, Item, Problems, below
from kvpolicy.stages.contracts import Plugin
from kvpolicy.stages.parameters import Nested, Plugged, Rule, is_required, rule_of
from kvpolicy.stages.registry.hooks import PROJECT
from kvpolicy.stages.registry.plugins import registry

VERSION_KEY = "kvpolicy"
INVALID: Final[Any] = object()


def structure(root: Item, default_name: str, problems: Problems) -> PolicySpec | None:
    """The policy in `root`; None if it has errors. Without a name it gets `default_name`."""
    if not isinstance(root.value, dict):
        message = f"must be a mapping with kvpolicy, budget and score: {shown(root.plain)}"
        problems.add(root.position, "", message)
        return None
    _check_version(root, problems)
    entries = {"name": Item(default_name, root.position), **root.value}
    entries.pop(VERSION_KEY, None)
    spec = _object(attrs.evolve(root, value=entries), PolicySpec, "", problems, extra_keys=(VERSION_KEY,))
    return None if spec is INVALID else spec


def _check_version(root: Item, problems: Problems) -> None:
    version = dict(root.mapping()).get(VERSION_KEY)
    if version is None:
        message = f"must be given, as the first line: {VERSION_KEY}: {SCHEMA_VERSION}"
        problems.add(root.position, VERSION_KEY, message)
    elif type(version.value) is not int or version.value != SCHEMA_VERSION:
        message = f"must be {SCHEMA_VERSION}, the version of policy files: {shown(version.plain)}"
        problems.add(version.position, VERSION_KEY, message)


def _value(item: Item, rule: Rule, path: str, problems: Problems) -> Any:
    if isinstance(rule, Plugged):
        return _plugin(item, rule.stage, path, problems)
    if isinstance(rule, ScoreRule):
        return _score(item, rule, path, problems)
    if isinstance(rule, Nested):
        if not isinstance(item.value, dict):
            problems.add(item.position, path, f"must be {rule}: {shown(item.plain)}")
            return INVALID
        return _object(item, rule.kind, path, problems)
    try:
        value = rule.convert(item.plain)
        accepted = rule.accepts(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a third party's rule may fail on any value
        problems.add(item.position, path, f"must be {one_line(rule)}: {shown(item.plain)}", error)
        return INVALID
    if not accepted:
        problems.add(item.position, path, f"must be {one_line(rule)}: {shown(item.plain)}")
    return value if accepted else INVALID


def _object(item: Item, attrs_class: type, path: str, problems: Problems, extra_keys: tuple[str, ...] = ()) -> Any:
    """An instance of `attrs_class`; `extra_keys` are keys that the caller removed from the mapping."""
    fields = {field.name: field for field in attrs.fields(attrs_class)}
    entries = dict(item.mapping())
    unknown = [key for key in entries if key not in fields]
    for key in unknown:
        message = f"unknown key{did_you_mean(key, [*extra_keys, *fields], 'known')}"
        problems.add(item.keys.get(key, item.position), below(path, key), message)
    values = {}
    for name, field in fields.items():
        if name in entries:
            values[name] = _value(entries[name], rule_of(field), below(path, name), problems)
        elif field.default is attrs.NOTHING:
            values[name] = _left_out(item, field, below(path, name), problems)
    if unknown or any(value is INVALID for value in values.values()):
        return INVALID
    return _built(item, attrs_class, values, path, problems)


def _left_out(item: Item, field: "attrs.Attribute[Any]", path: str, problems: Problems) -> Any:
    rule = rule_of(field)
    if is_required(field):
        problems.add(item.position, path, f"must be given: {rule}")
        return INVALID
    if isinstance(rule, Plugged):  # a default is the built-in plugin, even if another has the same name
        return _plugin(
            Item(rule.default, attrs.evolve(item.position, distribution=PROJECT)), rule.stage, path, problems
        )
    return _value(Item({}, item.position), rule, path, problems)


def _built(item: Item, attrs_class: type, values: dict[str, Any], path: str, problems: Problems) -> Any:
    try:
        return attrs_class(**values)
    except ParameterError as error:  # a rule between parameters, checked by the class itself
        problems.add(item.position, path, one_line(error), error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a third party's class may fail in any way
        problems.add(item.position, path, f"{one_line(attrs_class.__qualname__, 60)} failed: {described(error)}", error)
    return INVALID


def _plugin(item: Item, stage: str, path: str, problems: Problems, extra_keys: tuple[str, ...] = ()) -> Plugin | Any:
    """A plugin, written as a name or as a mapping with `use`."""
    if path.count(".") > MAX_DEPTH:  # defaults may refer to each other without end
        problems.add(item.position, path, f"must be nested at most {MAX_DEPTH} deep")
        return INVALID
    plugin_class = _plugin_class(item, stage, path, problems)
    if plugin_class is INVALID:
        return INVALID
    entries = {key: value for key, value in item.mapping() if key != "use"}
    return _object(attrs.evolve(item, value=entries), plugin_class, path, problems, ("use", *extra_keys))


def _plugin_class(item: Item, stage: str, path: str, problems: Problems) -> type[Plugin] | Any:
    name_item = item
    if isinstance(item.value, dict):
        if "use" not in item.value:
            problems.add(item.position, below(path, "use"), f"must be given: a plugin of the stage {stage!r}")
            return INVALID
        name_item, path = item.value["use"], below(path, "use")
    if not isinstance(name_item.value, str):
        form = "" if name_item is not item else ", or a mapping with `use`"
        problems.add(name_item.position, path, f"must be the name of a plugin{form}: {shown(name_item.plain)}")
        return INVALID
    try:
        return registry().find(stage, name_item.value, name_item.position.distribution)
    except PluginError as error:
        problems.add(name_item.position, path, str(error), error)
        return INVALID


def _score(item: Item, rule: Rule, path: str, problems: Problems) -> Any:
    if not isinstance(item.value, tuple) or not 1 <= len(item.value) <= MAX_SCORERS:
        problems.add(item.position, path, f"must be {rule}: {shown(item.plain)}")
        return INVALID
    terms = [_weighted(term, below(path, number), problems) for number, term in enumerate(item.value)]
    return INVALID if any(term is INVALID for term in terms) else tuple(terms)


def _weighted(item: Item, path: str, problems: Problems) -> Any:
    """A scorer with its weight: the keys of `Weighted` are in one mapping with `use` and the scorer's parameters."""
    keys = {key for key, _ in item.mapping()}
    scorer = _plugin(item.only(keys - set(TERM_KEYS)), "score", path, problems, TERM_KEYS)
    values = {}
    for field in attrs.fields(Weighted):
        if field.name in keys & set(TERM_KEYS):
            value = dict(item.mapping())[field.name]
            values[field.name] = _value(value, rule_of(field), below(path, field.name), problems)
    if scorer is INVALID or any(value is INVALID for value in values.values()):
        return INVALID
    return _built(item, Weighted, {"scorer": scorer, **values}, path, problems)
