"""`python -m tests.compiled_kernels`: compile every kernel for every target, without a GPU."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from kvpolicy.errors import KVPolicyError
from tests.compiled_kernels.kernel_table import differences, read_table, table_of
from tests.compiled_kernels.page import page_of
from tests.compiled_kernels.work import CompiledKernels, compile_all

_err = Console(stderr=True)


def compiled(
    names: Annotated[list[str] | None, typer.Argument(help="Only builds whose names begin so.")] = None,
    write: Annotated[Path | None, typer.Option(help="Write this .json and this .md.")] = None,
    against: Annotated[Path | None, typer.Option(help="Fail when numbers differ from this record.")] = None,
    few: Annotated[bool, typer.Option("--few", help="Only one build of each kernel, for one target in turn.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = min(8, os.cpu_count() or 1),
) -> None:
    """Compile every kernel for every target and print registers, shared memory, loads and tensor-core instructions."""
    try:
        recorded = None if against is None else read_table(against)
        outcome = _compile(jobs, names or [], few=few)
        table = table_of(outcome.compiled)
        page = page_of(table)
        if write is None:
            typer.echo(page)
        else:
            write.with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
            write.with_suffix(".md").write_text(page, encoding="utf-8")
    except (KVPolicyError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    faults = [*outcome.faults, *([] if recorded is None else differences(table, recorded))]
    if faults:
        raise SystemExit("\n".join(faults))


def _compile(jobs: int, names: list[str], *, few: bool) -> CompiledKernels:
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=_err, transient=True) as progress:
        bar = progress.add_task("compiling", total=None)

        def show(total: int, done: str) -> None:
            progress.update(bar, total=total, advance=1 if done else 0, description=done or "compiling")

        return compile_all(jobs, show, names, few=few)


if __name__ == "__main__":
    typer.run(compiled)
