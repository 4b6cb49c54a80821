"""`kvpolicy list` and `kvpolicy show`."""

from json import loads as json_of
from pathlib import Path
from typing import Annotated, Any

import typer

import kvpolicy_policies
from kvpolicy.cli.terminal.console import line, out, print_json
from kvpolicy.cli.terminal.options import Budget, Json, budget_override

SHIPPED = Path(kvpolicy_policies.__file__).parent


def list_policies(json: Json = False) -> None:
    """List the installed policies."""
    from kvpolicy.errors import KVPolicyError
    from kvpolicy.policy import load
    from kvpolicy.stages.registry.plugins import registry

    evidence = _evidence()
    policies: list[dict[str, Any]] = []
    for name, path in registry().policies().items():
        try:
            spec = load(path).spec
        except KVPolicyError as error:  # one bad file of a third party must not hide the others
            line(f"warning: {error}", error=True)
            continue
        better = evidence.get(name, {}) if path.parent == SHIPPED else {}
        about = {"name": name, "budget": str(spec.budget), "summary": spec.summary, "reference": spec.reference}
        policies.append({**about, "better": better})
    if json:
        print_json(policies)
        return
    out().print(_table(policies))
    line("Better: on these models never worse, and somewhere better, with the same bytes. Time is not compared.")


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
        summary = Text(policy["summary"])
        if policy["better"]:
            better: dict[str, list[str]] = {}
            for model, other in policy["better"].items():
                better.setdefault(other, []).append(model)
            others = (f"{other} on {' and '.join(models)}" for other, models in better.items())
            summary.append(f"\nbetter: {', '.join(others)}", "dim")
        table.add_row(Text(policy["name"], no_wrap=True), policy["budget"], summary)
    return table


def _evidence() -> dict[str, dict[str, str]]:
    """By shipped policy, and model on which all have been measured, another policy that is better there."""
    by_model: dict[str, dict[str, str]] = json_of((SHIPPED / "evidence.json").read_text("utf-8"))
    names = sorted({name for better in by_model.values() for name in better})
    return {name: {model: better[name] for model, better in by_model.items() if name in better} for name in names}
