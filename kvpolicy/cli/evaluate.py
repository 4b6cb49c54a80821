"""`kvpolicy evaluate`: every policy's bytes, accuracy, attention error and decode time in one table."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli.console import line
from kvpolicy.cli.files import make_folder, write_text
from kvpolicy.cli.progress import bars
from kvpolicy.evaluate.data.files import read_text

if TYPE_CHECKING:
    from kvpolicy.evaluate.table.setup import TableSetup

_QUICK: dict[str, Any] = {"items": 1, "length": 128, "rows": 1, "error_items": 1, "error_steps": 4}
_QUICK_DECODE: dict[str, Any] = {
    "lengths": (128, 256),
    "pairs": 2,
    "hidden": 64,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
}
_QUICK_SHARES = 2


def evaluate(
    policy: Annotated[
        list[str] | None, typer.Option(help="A policy's name or file; may be repeated. By default all installed ones.")
    ] = None,
    items: Annotated[int, typer.Option(help="Questions per task.")] = 48,
    seed: Annotated[int, typer.Option(help="Decides the questions.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="One short question a task: does it run?")] = False,
    record: Annotated[
        Path | None, typer.Option("--from", help="Measure nothing: render this record of an earlier run.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the record there as JSON, and pictures beside it.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the page there instead of printing it.")] = None,
) -> None:
    """Measure policies on the embedded model: bytes, answers, attention error; and time of decode steps."""
    _require_places(out, markdown)
    evaluation = _read(record) if record is not None else _measure(_setup(policy, items, seed, quick=quick))
    if out is not None:
        _write_record(out, evaluation)
    _write_page(markdown, evaluation)


def _setup(names: list[str] | None, items: int, seed: int, *, quick: bool) -> "TableSetup":
    from attrs import evolve

    from kvpolicy.evaluate.table.setup import BASES, TableSetup
    from kvpolicy.policy import load
    from kvpolicy.stages.registry.plugins import registry

    policies = tuple(map(load, names)) if names else tuple(map(load, registry().policies()))
    policies = tuple(sorted(policies, key=lambda policy: policy.name != "full"))
    bases = tuple(policy for base in BASES for policy in policies if policy.name == base)
    setup = TableSetup(policies, bases, registry().names("merge"), items=items, seed=seed)
    if quick:
        decode = evolve(setup.decode, **_QUICK_DECODE)
        setup = evolve(setup, **_QUICK, shares=setup.shares[:_QUICK_SHARES], calibration=(3, 64), decode=decode)
    return setup


def _require_places(*files: Path | None) -> None:
    """Make the folders now: an hour of results must not be lost to a mistyped name."""
    from kvpolicy.errors import InputError

    for file in files:
        if file is None:
            continue
        make_folder(file.parent)
        if file.is_dir():
            raise InputError(f"{file}: is a folder")


def _read(file: Path) -> dict[str, Any]:
    import json

    from kvpolicy.errors import InputError, one_line
    from kvpolicy.evaluate.table.table_data import FORM

    try:
        evaluation: dict[str, Any] = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise InputError(f"--from {file}: cannot be read: {one_line(error)}") from error
    if not isinstance(evaluation, dict) or evaluation.get("form") != FORM:
        raise InputError(f"--from {file}: is not a record of kvpolicy evaluate (form {FORM})")
    return evaluation


def _measure(setup: "TableSetup") -> dict[str, Any]:
    import torch

    from kvpolicy.evaluate.models import TESTBED, load_model
    from kvpolicy.evaluate.table.run import DTYPE
    from kvpolicy.evaluate.table.run import evaluate as run

    model, tokenizer = load_model(TESTBED, torch.device("cpu"), DTYPE)
    with bars() as watcher:
        return run(model, tokenizer, setup, watcher)


def _write_record(file: Path, evaluation: dict[str, Any]) -> None:
    import json

    from kvpolicy.evaluate.plots import MISSING, can_plot

    write_text(file, json.dumps(evaluation, indent=1, ensure_ascii=False) + "\n")
    if not can_plot():
        line(MISSING, error=True)
        return
    from kvpolicy.evaluate.table.pictures import draw

    draw(evaluation, file.parent)


def _write_page(file: Path | None, evaluation: dict[str, Any]) -> None:
    from kvpolicy.evaluate.table.page import page_of

    page = page_of(evaluation)
    if file is None:
        line(page.rstrip())
    else:
        write_text(file, page)
