"""`kvpolicy bench gpu`: everything that a GPU can show."""

from typing import Annotated

import typer

from kvpolicy.cli.bench import arguments
from kvpolicy.cli.bench.output import print_verdicts
from kvpolicy.cli.bench.session import session
from kvpolicy.cli.terminal.options import Device


def gpu(
    budget: arguments.Budget = 1024,
    device: Device = "cuda",
    seconds: Annotated[float, typer.Option(help="Time for everything together.")] = 480.0,
    name: Annotated[str, typer.Option(help="Word in the names of the files: gpu-DATE-NAME.json.")] = "",
    part: Annotated[
        list[str] | None, typer.Option(help="Measure this part only; may be repeated. By default all of them.")
    ] = None,
    graph: arguments.Graph = False,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: does it run?")] = False,
    out: arguments.Out = arguments.OUT,
) -> None:
    """Everything above on a GPU, and whether its kernels are right, in eight minutes."""
    from datetime import UTC, datetime

    import torch

    from kvpolicy.bench.gpu import PARTS, measure, setup_for
    from kvpolicy.bench.report.verdict import Verdict
    from kvpolicy.bench.sizes import GPU, TINY
    from kvpolicy.errors import InputError

    unknown = sorted({*(part or ())} - {*PARTS})
    if unknown:
        raise InputError(f"--part must be one of {', '.join(PARTS)}: {', '.join(unknown)}")
    target, kind, _ = arguments.target_of(device, None)
    setup = setup_for(TINY if quick else GPU, budget, target, kind, graph=graph)
    card = "-".join(torch.cuda.get_device_name(target).lower().split()) if target.type == "cuda" else "cpu"
    file = f"gpu-{datetime.now(UTC).date().isoformat()}-{name or card}"
    options = {"budget": budget, "seconds": seconds, "graph": graph, "quick": quick, "device": str(target)}
    with session("gpu", options, out, target, setup.steps, seconds=seconds, file=file) as run:
        for what in measure(setup, run.clock, run.deadline, run.result, part or PARTS):
            run.done(what)
    print_verdicts([Verdict.from_dict(goal) for goal in run.result.facts["goals"]])
