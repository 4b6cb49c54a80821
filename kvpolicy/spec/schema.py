"""JSON Schema of policy files, for editors: made from the classes that read them, third parties' included."""

from typing import Any

from kvpolicy.spec.policy import BESIDE, SCHEMA_VERSION, PolicySpec, Weighted
from kvpolicy.spec.structure import VERSION_KEY
from kvpolicy.stages.contracts import STAGES
from kvpolicy.stages.parameters import object_schema
from kvpolicy.stages.registry.plugins import Record, registry

_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of a policy file, with every plugin that is installed here."""
    whole = object_schema(PolicySpec)
    version = {"const": SCHEMA_VERSION, "description": "version of the form of policy files"}
    required = [key for key in whole["required"] if key != "name"]  # the file has one
    definitions: dict[str, Any] = {}
    for stage in STAGES:
        records = [record for record in registry().plugins() if record.stage == stage]
        definitions[stage] = _choice(stage, records)
        definitions |= {f"{stage}/{record.qualified}": _mapping(record) for record in records}
    scorers = [record for record in registry().plugins() if record.stage == "score"]
    definitions["weighted"] = _choice("weighted", scorers)
    definitions |= {f"weighted/{record.qualified}": _weighted(record) for record in scorers}
    return {
        "$schema": _DRAFT,
        "title": "kvpolicy policy",
        **whole,
        "properties": {VERSION_KEY: version, **whole["properties"]},
        "required": [VERSION_KEY, *required],
        "$defs": definitions,
    }


def _choice(definition: str, records: list[Record]) -> dict[str, Any]:
    """Any of the plugins: as a mapping, or as a word where no parameter must be given."""
    words = [name for record in records if not _parameters(record)["required"] for name in _names(record)]
    mappings = [{"$ref": f"#/$defs/{definition}~1{record.qualified}"} for record in records]
    return {"anyOf": [{"enum": words}, *mappings]}


def _mapping(record: Record) -> dict[str, Any]:
    parameters = _parameters(record)
    return {
        **parameters,
        "description": record.summary,
        "properties": {"use": {"enum": _names(record)}, **parameters["properties"]},
        "required": ["use", *parameters["required"]],
    }


def _weighted(record: Record) -> dict[str, Any]:
    scorer = _mapping(record)
    terms = object_schema(Weighted)["properties"]
    beside = {key: terms[key] for key in BESIDE}
    return {**scorer, "properties": {**scorer["properties"], **beside}}


def _parameters(record: Record) -> dict[str, Any]:
    return object_schema(record.kind)


def _names(record: Record) -> list[str]:
    """What a file may call the plugin: `distribution:name` always, the name alone if no other has it."""
    name = registry().reference(record.kind)
    return list(dict.fromkeys((name, record.qualified)))
