"""`kvpolicy bench`: each benchmark is a subcommand with a file of its own."""

import typer

from kvpolicy.cli.bench.compress import compress
from kvpolicy.cli.bench.decode import decode
from kvpolicy.cli.bench.gates import gates
from kvpolicy.cli.bench.generate import generate
from kvpolicy.cli.bench.gpu import gpu
from kvpolicy.cli.bench.peers import peers

bench = typer.Typer(no_args_is_help=True, help="Measure time and memory against baselines and against the floor.")
for command in (compress, decode, generate, gates, gpu):
    bench.command()(command)
bench.add_typer(peers, name="peers")
