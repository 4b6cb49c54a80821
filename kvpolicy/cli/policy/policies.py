"""`kvpolicy list` and `kvpolicy show`."""

from typing import Annotated, Any

import typer

from kvpolicy.cli.terminal.console import line, out, print_json
from kvpolicy.cli.terminal.options import Budget, Json, budget_override


def list_policies(json: Json = False) -> None:
    """List the installed policies."""
    from kvpolicy.errors import KVPolicyError
    from kvpolicy.policy import load
    from kvpolicy.stages.registry.plugins import registry

    policies: list[dict[str, Any]] = []
    for name, path in registry().policies().items():
        try:
            spec = load(path).spec
        except KVPolicyError as error:  # one bad file of a third party must not hide the others
            line(f"warning: {error}", error=True)
            continue
        policies.append(
            {"name": name, "budget": str(spec.budget), "summary": spec.summary, "reference": spec.reference}
        )
    print_json(policies) if json else out().print(_table(policies))


def show(
    name: Annotated[str, typer.Argument(help="An installed policy's name, or a file.")],
    budget: Budget = None,
    json: Json = False,
) -> None:
    """Print a policy as YAML in its canonical form."""
    from kvpolicy.policy import load

    policy = load(name, **budget_override(budget))
    if json:
        import yaml

        data = yaml.safe_load(policy.to_yaml())
        print_json({"name": policy.name, "digest": policy.digest, "origin": policy.origin, "policy": data})
    else:
        line(policy.to_yaml().rstrip())


def _table(policies: list[dict[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("name", "budget", "summary", title="Installed policies")
    for policy in policies:
        table.add_row(Text(policy["name"], no_wrap=True), policy["budget"], Text(policy["summary"]))
    return table
