"""`kvpolicy plugins` and `kvpolicy schema`."""

from typing import Annotated, Any

import typer

from kvpolicy.cli.console import line, out, print_json
from kvpolicy.cli.options import Json


def plugins(json: Json = False) -> None:
    """List the installed plugins, the broken ones too."""
    from kvpolicy.stages.registry.plugins import registry

    records = [
        {
            "name": one.name,
            "stage": one.stage,
            "distribution": one.distribution,
            "version": one.version,
            "summary": one.summary,
            "reference": one.kind.reference,
        }
        for one in registry().plugins()
    ]
    broken = [{"source": str(one.source), "error": str(one)} for one in registry().broken]
    if json:
        print_json({"plugins": records, "broken": broken})
        return
    out().print(_table(records))
    for one in broken:
        line(f"broken: {one['error']}", error=True)


def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="A page for people instead.")] = False,
) -> None:
    """Print the JSON Schema of policy files, for editors; it knows every installed plugin."""
    from kvpolicy.spec.reference import reference_markdown
    from kvpolicy.spec.schema import json_schema

    if markdown:
        line(reference_markdown().rstrip())
    else:
        print_json(json_schema())


def _table(records: list[dict[str, str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("stage", "name", "distribution", "summary", title="Installed plugins")
    for one in records:
        origin = f"{one['distribution']} {one['version']}"
        table.add_row(one["stage"], Text(one["name"], no_wrap=True), Text(origin), Text(one["summary"]))
    return table
