"""How every command fails: one line a problem, exit code 2, and a traceback only for those who ask."""

from typing import Any

import typer
from typer.core import TyperGroup

from kvpolicy.cli.console import line
from kvpolicy.errors import KVPolicyError

TRACEBACK = "--traceback"
FAILED = 2


class KVPolicyGroup(TyperGroup):
    """The group of all commands. `--traceback` may stand anywhere on the line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        if TRACEBACK in args[:end]:
            args = [TRACEBACK, *(one for place, one in enumerate(args) if one != TRACEBACK or place >= end)]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KVPolicyError as error:
            if ctx.params.get("traceback"):
                raise
            for problem in str(error).splitlines() or [type(error).__name__]:
                line(f"error: {problem}", error=True)
            raise typer.Exit(FAILED) from error
