"""`kvpolicy check`: every problem of every file, for people and for CI."""

from pathlib import Path
from typing import Annotated

import typer

from kvpolicy.cli.terminal.console import line, print_json
from kvpolicy.cli.terminal.options import Json

BAD = 1


def check_policies(
    files: Annotated[list[Path], typer.Argument(help="Policy files.", metavar="FILE...")], json: Json = False
) -> None:
    """Check policy files; exit code 1 when one of them is bad."""
    results = [(file, *_check(file)) for file in files]
    if json:
        print_json([{"file": str(file), "digest": digest, "problems": problems} for file, digest, problems in results])
    else:
        for file, digest, problems in results:
            for problem in problems:
                line(problem, error=True)
            if not problems:
                line(f"{file}: good ({digest})")
    if any(problems for _, _, problems in results):
        raise typer.Exit(BAD)


def _check(file: Path) -> tuple[str | None, list[str]]:
    """The digest of a good file, or what is wrong with it."""
    from kvpolicy.errors import KVPolicyError
    from kvpolicy.spec.dump import digest
    from kvpolicy.spec.load import read_policy

    try:
        return digest(read_policy(file)[0]), []
    except KVPolicyError as error:
        return None, str(error).splitlines()
