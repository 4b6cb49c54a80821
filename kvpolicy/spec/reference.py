"""The reference of policy files as Markdown, generated from the classes that read them."""

from collections.abc import Iterator
from typing import Any

import attrs

from kvpolicy.spec.policy import Allocate, Compress, PolicySpec, Protect, Weighted
from kvpolicy.stages.contracts import STAGES
from kvpolicy.stages.parameters import Nested, rule_of
from kvpolicy.stages.registry.plugins import RegisteredPlugin, registry

_BLOCKS = {"compress": Compress, "protect": Protect, "allocate": Allocate, "score, beside `use`": Weighted}


def reference_markdown() -> str:
    """All keys of a policy file and all installed plugins, as one page."""
    return "\n".join(_page()).rstrip() + "\n"


def _page() -> Iterator[str]:
    yield "# Policy files\n"
    yield "Made by `kvpolicy schema --markdown`; do not edit. `kvpolicy schema` gives the same as JSON Schema.\n"
    yield "## Top level\n"
    yield "`kvpolicy: 1` is required: the version of this form.\n"
    yield from _table(PolicySpec)
    for name, attrs_class in _BLOCKS.items():
        yield f"### {name}\n"
        yield from _table(attrs_class, without=("scorer",))
    for stage in STAGES:
        yield f"## Stage `{stage}`\n"
        for plugin in registry().plugins():
            if plugin.stage == stage:
                yield from _plugin(plugin)


def _plugin(plugin: RegisteredPlugin) -> Iterator[str]:
    yield f"### {plugin.name}\n"
    origin = f" ({plugin.kind.reference})" if plugin.kind.reference else ""
    yield f"{plugin.summary}{origin}\n"
    plugin_class: Any = plugin.kind
    if attrs.fields(plugin_class):
        yield from _table(plugin_class)


def _table(attrs_class: Any, without: tuple[str, ...] = ()) -> Iterator[str]:
    yield "| key | must be | default | meaning |"
    yield "|---|---|---|---|"
    for path, field in _fields(attrs_class, ""):
        if field.name not in without:
            rule = str(rule_of(field)).replace("|", "\\|")
            yield f"| `{path}` | {rule} | {_default(field)} | {field.metadata['help']} |"
    yield ""


def _fields(attrs_class: Any, prefix: str) -> "Iterator[tuple[str, attrs.Attribute[Any]]]":
    for field in attrs.fields(attrs_class):
        rule = rule_of(field)
        yield prefix + field.name, field
        if isinstance(rule, Nested) and rule.kind not in _BLOCKS.values():
            yield from _fields(rule.kind, f"{prefix}{field.name}.")


def _default(field: "attrs.Attribute[Any]") -> str:
    implied = getattr(rule_of(field), "default", None)
    if isinstance(implied, str) and implied:
        return f"`{implied}`"
    if field.default is attrs.NOTHING:
        return "required"
    if isinstance(field.default, bool):
        return "`true`" if field.default else "`false`"
    if isinstance(field.default, (int, float, str)):
        return f"`{field.default}`" if field.default != "" else "empty"
    return ""
