"""`kvpolicy demo`: the embedded model with its full cache and with several policies, side by side."""

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli.console import err, line, out, print_json
from kvpolicy.cli.files import make_folder, write_text
from kvpolicy.cli.options import Json

if TYPE_CHECKING:
    from kvpolicy.evaluate.compare import Outcome
    from kvpolicy.evaluate.retention import Kept
    from kvpolicy.evaluate.setup import Setup
    from kvpolicy.policy import Policy

POLICIES = tuple(f"kvpolicy:{name}" for name in ("streaming_llm", "h2o", "snapkv", "rkv", "blend"))
SHARES = ("25%", "10%")
RETAINED = Fraction(1, 4)
QUICK: dict[str, Any] = {"items": 2, "length": 128, "rows": 2}


def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for pictures and results.")] = Path("demo-results"),
    policy: Annotated[list[str] | None, typer.Option(help="A policy's name or file; may be repeated.")] = None,
    share: Annotated[list[str] | None, typer.Option(help="Share of the full cache's bytes; may be repeated.")] = None,
    items: Annotated[int, typer.Option(help="Questions per task.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens per question.")] = 1024,
    question: Annotated[
        str, typer.Option(help="seen by the scorers when they compress the context, or unseen.")
    ] = "seen",
    seed: Annotated[int, typer.Option(help="Decides the questions.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Two short questions a task: does it run?")] = False,
    json: Json = False,
) -> None:
    """Compare policies with the full cache on the embedded model: accuracy, bytes held, speed; and draw it."""
    from attrs import evolve

    from kvpolicy.evaluate.plots import MISSING, can_plot
    from kvpolicy.evaluate.setup import Setup

    shares = tuple(_share(text) for text in share or SHARES)
    setup = Setup(_policies(policy or POLICIES), shares, items=items, length=length, seed=seed, question=question)
    setup = evolve(setup, **QUICK) if quick else setup
    make_folder(out_dir, "--out ")
    outcomes, kept = _measure(setup)
    results = _write(out_dir, setup, outcomes, kept)
    print_json(results) if json else out().print(_tables(setup, outcomes))
    if not can_plot():
        line(MISSING, error=True)
    line(f"written to {out_dir}: {', '.join(sorted(path.name for path in out_dir.iterdir()))}", error=True)


def _share(text: str) -> Fraction:
    from kvpolicy.errors import InputError
    from kvpolicy.spec.budget import Budget

    budget = Budget.parse(text)
    if budget is None or budget.share is None or budget.share == 1:
        raise InputError(f"--share must be a percentage above 0% and below 100%: {text!r}")
    return budget.share


def _policies(names: "list[str] | tuple[str, ...]") -> "tuple[Policy, ...]":
    from kvpolicy.errors import InputError
    from kvpolicy.policy import load

    policies = tuple(load(name) for name in names)
    if any(policy.name == "full" for policy in policies):
        raise InputError("the full cache is part of every comparison: leave the policy 'full' out")
    return policies


def _measure(setup: "Setup") -> "tuple[tuple[Outcome, ...], Kept]":
    import torch
    from rich.progress import Progress

    from kvpolicy.evaluate.compare import compare, steps
    from kvpolicy.evaluate.models import TESTBED, load_model
    from kvpolicy.evaluate.retention import retention

    model, tokenizer = load_model(TESTBED, torch.device("cpu"), None)
    few = sorted({0, len(setup.policies) // 2, len(setup.policies) - 1})
    pictured = tuple(setup.policies[index] for index in few)
    with Progress(console=err(), transient=True) as progress:
        task = progress.add_task("starting", total=steps(setup))

        def done(text: str) -> None:
            progress.update(task, advance=1, description=text)

        outcomes = compare(model, tokenizer, setup, done)
        kept = retention(model, tokenizer, pictured, share=RETAINED, seed=setup.seed, question=setup.question)
    return outcomes, kept


def _write(folder: Path, setup: "Setup", outcomes: "tuple[Outcome, ...]", kept: "Kept") -> dict[str, Any]:
    from json import dumps

    from kvpolicy.evaluate.comparison_data import comparison_data
    from kvpolicy.evaluate.plots import can_plot

    results = comparison_data(setup, outcomes, kept)
    write_text(folder / "results.json", dumps(results, indent=1) + "\n")
    if can_plot():
        from kvpolicy.evaluate.heatmap import plot_retention
        from kvpolicy.evaluate.tradeoff import plot_tradeoff

        plot_retention(kept, folder / "retention.png")
        plot_tradeoff(setup, outcomes, folder / "tradeoff.png")
    return results


def _tables(setup: "Setup", outcomes: "tuple[Outcome, ...]") -> Any:
    from kvpolicy.cli.demo_table import table_of

    return table_of(setup, outcomes)
