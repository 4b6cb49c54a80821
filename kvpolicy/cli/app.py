"""The command line: which commands there are. Each has a file of its own and imports what it needs when it runs."""

from typing import Annotated

import typer

from kvpolicy.cli.bench import bench
from kvpolicy.cli.generate.chat import chat
from kvpolicy.cli.generate.run import run
from kvpolicy.cli.group import TRACEBACK, KVPolicyGroup
from kvpolicy.cli.policy.check import check_policies
from kvpolicy.cli.policy.plan import plan
from kvpolicy.cli.policy.policies import list_policies, show
from kvpolicy.cli.policy.registry import plugins, schema
from kvpolicy.cli.quality.calibrate import calibrate
from kvpolicy.cli.quality.demo import demo
from kvpolicy.cli.quality.evaluate import evaluate
from kvpolicy.cli.quality.recommend import recommend

app = typer.Typer(
    cls=KVPolicyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from kvpolicy import __version__

        typer.echo(__version__)
        raise typer.Exit


_Version = Annotated[bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)]
_Traceback = Annotated[bool, typer.Option(TRACEBACK, help="Show where an error was raised.")]


@app.callback()
def root(version: _Version = False, traceback: _Traceback = False) -> None:
    """Keep the KV cache of Hugging Face transformers models small, by a policy written in YAML."""


for command, name in (
    (demo, "demo"),
    (evaluate, "evaluate"),
    (recommend, "recommend"),
    (run, "run"),
    (chat, "chat"),
    (plan, "plan"),
    (calibrate, "calibrate"),
    (list_policies, "list"),
    (show, "show"),
    (check_policies, "check"),
    (plugins, "plugins"),
    (schema, "schema"),
):
    app.command(name)(command)
app.add_typer(bench, name="bench")
