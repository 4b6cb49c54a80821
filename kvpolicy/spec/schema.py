"""JSON Schema of policy files, for editors. Generated from the classes that read them, also those of third parties."""

from typing import Any

from kvpolicy.spec.policy import SCHEMA_VERSION, TERM_KEYS, PolicySpec, Weighted
from kvpolicy.spec.structure import VERSION_KEY
from kvpolicy.stages.contracts import STAGES
from kvpolicy.stages.parameters import object_schema
from kvpolicy.stages.registry.plugins import RegisteredPlugin, registry

_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of a policy file, with all installed plugins."""
    policy = object_schema(PolicySpec)
    version = {"const": SCHEMA_VERSION, "description": "version of the form of policy files"}
    required = [key for key in policy["required"] if key != "name"]  # the default is the name of the file
    definitions: dict[str, Any] = {}
    for stage in STAGES:
        plugins = [plugin for plugin in registry().plugins() if plugin.stage == stage]
        definitions[stage] = _choice(stage, plugins)
        definitions |= {f"{stage}/{plugin.qualified}": _mapping(plugin) for plugin in plugins}
    scorers = [plugin for plugin in registry().plugins() if plugin.stage == "score"]
    definitions["weighted"] = _choice("weighted", scorers)
    definitions |= {f"weighted/{plugin.qualified}": _weighted(plugin) for plugin in scorers}
    return {
        "$schema": _DRAFT,
        "title": "kvpolicy policy",
        **policy,
        "properties": {VERSION_KEY: version, **policy["properties"]},
        "required": [VERSION_KEY, *required],
        "$defs": definitions,
    }


def _choice(definition: str, plugins: list[RegisteredPlugin]) -> dict[str, Any]:
    """Any of the plugins: as a mapping, or as its name if no parameter is required."""
    words = [name for plugin in plugins if not _parameters(plugin)["required"] for name in _names(plugin)]
    mappings = [{"$ref": f"#/$defs/{definition}~1{plugin.qualified}"} for plugin in plugins]
    return {"anyOf": [{"enum": words}, *mappings]}


def _mapping(plugin: RegisteredPlugin) -> dict[str, Any]:
    parameters = _parameters(plugin)
    return {
        **parameters,
        "description": plugin.summary,
        "properties": {"use": {"enum": _names(plugin)}, **parameters["properties"]},
        "required": ["use", *parameters["required"]],
    }


def _weighted(plugin: RegisteredPlugin) -> dict[str, Any]:
    scorer = _mapping(plugin)
    terms = object_schema(Weighted)["properties"]
    term_keys = {key: terms[key] for key in TERM_KEYS}
    return {**scorer, "properties": {**scorer["properties"], **term_keys}}


def _parameters(plugin: RegisteredPlugin) -> dict[str, Any]:
    return object_schema(plugin.kind)


def _names(plugin: RegisteredPlugin) -> list[str]:
    """Names of the plugin in a file: `distribution:name`, and the name alone if no other plugin has it."""
    name = registry().reference(plugin.kind)
    return list(dict.fromkeys((name, plugin.qualified)))
