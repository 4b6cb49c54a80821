"""`kvpolicy plugins` and `kvpolicy schema`."""

from typing import Annotated, Any

import typer

from kvpolicy.cli.terminal.console import line, out, print_json
from kvpolicy.cli.terminal.options import Json


def plugins(json: Json = False) -> None:
    """List the installed plugins, the broken ones too."""
    from kvpolicy.stages.registry.plugins import registry

    rows = [
        {
            "name": plugin.name,
            "stage": plugin.stage,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "summary": plugin.summary,
            "reference": plugin.kind.reference,
        }
        for plugin in registry().plugins()
    ]
    broken = [{"source": str(error.source), "error": str(error)} for error in registry().broken]
    if json:
        print_json({"plugins": rows, "broken": broken})
        return
    out().print(_table(rows))
    for problem in broken:
        line(f"broken: {problem['error']}", error=True)


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


def _table(rows: list[dict[str, str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("stage", "name", "distribution", "summary", title="Installed plugins")
    for row in rows:
        owner = f"{row['distribution']} {row['version']}"
        table.add_row(row["stage"], Text(row["name"], no_wrap=True), Text(owner), Text(row["summary"]))
    return table
