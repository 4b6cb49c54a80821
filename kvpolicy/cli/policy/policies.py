"""`kvpolicy list` and `kvpolicy show`."""

from enum import StrEnum
from json import loads as json_of
from pathlib import Path
from typing import Annotated, Any

import typer

import kvpolicy_policies
from kvpolicy.cli.terminal.console import line, out, print_json
from kvpolicy.cli.terminal.options import Budget, Json, budget_override

SHIPPED = Path(kvpolicy_policies.__file__).parent


class By(StrEnum):
    """What policies are listed by."""

    saves = "saves"
    stages = "stages"
    needs = "needs"


def list_policies(
    by: Annotated[By, typer.Option(help="Group them by what they save, are composed of, or need.")] = By.saves,
    json: Json = False,
) -> None:
    """List the installed policies by what they save, are composed of, or need."""
    from kvpolicy.errors import KVPolicyError
    from kvpolicy.spec.load import read_policy
    from kvpolicy.spec.traits import compresses, needs, saves, stages
    from kvpolicy.stages.registry.plugins import registry

    evidence = _evidence()
    policies: list[dict[str, Any]] = []
    for name, path in registry().policies().items():
        try:
            spec, _ = read_policy(path)
        except KVPolicyError as error:  # one bad file of a third party must not hide the others
            line(f"warning: {error}", error=True)
            continue
        better = evidence.get(name, {}) if path.parent == SHIPPED else {}
        about = {"name": name, "budget": str(spec.budget), "summary": spec.summary, "reference": spec.reference}
        traits = {"saves": saves(spec), "stages": stages(spec), "compresses": compresses(spec), "needs": needs(spec)}
        policies.append({**about, **traits, "better": better})
    if json:
        print_json(policies)
        return
    out().print(_table(_groups(policies, by)))
    line("Better: on these models never worse, and somewhere better, with the same bytes. Time is not compared.")


def show(
    name: Annotated[str, typer.Argument(help="An installed policy's name, or a file.")],
    budget: Budget = None,
    json: Json = False,
) -> None:
    """Print a policy as YAML in its canonical form."""
    from kvpolicy.spec.dump import digest, to_yaml
    from kvpolicy.spec.load import read_policy

    spec, origin = read_policy(name, **budget_override(budget))
    text = to_yaml(spec)
    if json:
        import yaml

        print_json({"name": spec.name, "digest": digest(spec), "origin": origin, "policy": yaml.safe_load(text)})
    else:
        line(text.rstrip())


def _groups(policies: list[dict[str, Any]], by: By) -> dict[str, list[dict[str, Any]]]:
    """Policies by the title of their group; one that has several parts, or needs, is in each of these groups."""
    from kvpolicy.spec.traits import SAVES

    if by is By.saves:
        return {title: [one for one in policies if one["saves"] == kind] for kind, title in SAVES.items()}
    found = sorted({part for one in policies for part in one[by.value]}, key=_in_order)
    groups = {part: [one for one in policies if part in one[by.value]] for part in found}
    return {**groups, "nothing": [one for one in policies if not one[by.value]]}


def _in_order(part: str) -> tuple[int, str]:
    """Stages in the order in which they run, and by name; needs by name."""
    from kvpolicy.stages.contracts import STAGES

    order, stage = list(STAGES), part.partition(":")[0]
    return order.index(stage) if stage in order else 0, part


def _table(groups: dict[str, list[dict[str, Any]]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("name", "budget", "summary", title="Installed policies")
    for title, policies in groups.items():
        if policies:
            table.add_section()
            table.add_row("", "", Text(title, "bold"))
        for policy in policies:
            table.add_row(Text(policy["name"], no_wrap=True), policy["budget"], _described(policy))
    return table


def _described(policy: dict[str, Any]) -> Any:
    """The summary; where entries are evicted, unless everywhere; what is needed; and who is better."""
    from rich.text import Text

    described = Text(policy["summary"])
    if len(policy["compresses"]) == 1:
        described.append(
            f"\nevicts only {'from the prompt' if policy['compresses'][0] == 'prompt' else 'while decoding'}", "dim"
        )
    if policy["needs"]:
        described.append(f"\nneeds: {', '.join(policy['needs'])}", "dim")
    if policy["better"]:
        better: dict[str, list[str]] = {}
        for model, other in policy["better"].items():
            better.setdefault(other, []).append(model)
        others = (f"{other} on {' and '.join(models)}" for other, models in better.items())
        described.append(f"\nbetter: {', '.join(others)}", "dim")
    return described


def _evidence() -> dict[str, dict[str, str]]:
    """By shipped policy, and model on which all have been measured, another policy that is better there."""
    by_model: dict[str, dict[str, str]] = json_of((SHIPPED / "evidence.json").read_text("utf-8"))
    names = sorted({name for better in by_model.values() for name in better})
    return {name: {model: better[name] for model, better in by_model.items() if name in better} for name in names}
