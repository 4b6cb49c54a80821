"""`kvpolicy bench gates`: what the project claims, on this CPU."""

from typing import Annotated

import typer

from kvpolicy.cli.bench import arguments
from kvpolicy.cli.bench.output import print_verdicts
from kvpolicy.cli.bench.session import session


def gates(
    gate: Annotated[list[str] | None, typer.Option(help="One of them; may be repeated. By default all.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: does it run? What it says means nothing.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads; the claims are for one.")] = 1,
    out: arguments.Out = arguments.OUT,
) -> None:
    """Whether the claims about speed, which are for one thread, hold on this CPU; exits with 1 when one does not."""
    import torch

    from kvpolicy.bench.gates import GATES, QUICK, Scale, judge
    from kvpolicy.errors import InputError, did_you_mean

    names = tuple(gate or GATES)
    for name in names:
        if name not in GATES:
            raise InputError(f"--gate {name!r} is unknown{did_you_mean(name, GATES, 'gates')}")
    verdicts, options = [], {"gates": list(names), "quick": quick}
    with session("gates", options, out, torch.device("cpu"), len(names), threads=threads) as run:
        for name, (of_gate, cases) in judge(names, QUICK if quick else Scale(), run.clock):
            verdicts += of_gate
            run.result.note("gates", [verdict.to_dict() for verdict in verdicts])
            run.collect(name, iter([(name, cases)]))
    print_verdicts(verdicts)
    if not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(1)
