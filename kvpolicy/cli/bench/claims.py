"""`kvpolicy bench gates` and `kvpolicy bench gpu`: what the project claims, on this machine."""

from typing import TYPE_CHECKING, Annotated

import typer

from kvpolicy.cli.bench.options import OUT, Budget, Graph, Out, place, run
from kvpolicy.cli.bench.output import finish, opened, print_verdicts
from kvpolicy.cli.options import Device

if TYPE_CHECKING:
    import torch


def gates(
    gate: Annotated[list[str] | None, typer.Option(help="One of them; may be repeated. By default all.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: does it run? What it says means nothing.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads; the claims are for one.")] = 1,
    out: Out = OUT,
) -> None:
    """Whether the claims about speed, which are for one thread, hold on this CPU; exits with 1 when one does not."""
    import torch

    from kvpolicy.bench.gates import GATES, QUICK, Scale, judge
    from kvpolicy.errors import InputError, did_you_mean

    names = tuple(gate or GATES)
    for name in names:
        if name not in GATES:
            raise InputError(f"--gate {name!r} is unknown{did_you_mean(name, GATES, 'gates')}")
    with run(torch.device("cpu"), threads, None) as (clock, _, watcher):
        result, verdicts = opened("gates", out, {"gates": list(names), "quick": quick}), []
        done = watcher.begin("gates", len(names))
        for name, (found, cases) in judge(names, QUICK if quick else Scale(), clock):
            verdicts += found
            for case in cases:
                result.add(name, case)
            result.note("gates", [one.to_dict() for one in verdicts])
            done(name)
    finish(result)
    print_verdicts(verdicts)
    if not all(one.passed for one in verdicts):
        raise typer.Exit(1)


def gpu(
    budget: Budget = 1024,
    device: Device = "cuda",
    seconds: Annotated[float, typer.Option(help="Time for everything together.")] = 540.0,
    name: Annotated[str, typer.Option(help="Word in the names of the files: gpu-DATE-NAME.json.")] = "",
    graph: Graph = False,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: does it run?")] = False,
    out: Out = OUT,
) -> None:
    """Everything above on a GPU, and whether its kernels are right, in nine minutes."""
    from datetime import UTC, datetime

    from kvpolicy.bench.gates import Verdict
    from kvpolicy.bench.gpu import measure, setup_for
    from kvpolicy.bench.protocol.sizes import GPU, TINY

    target, kind, _ = place(device, None)
    sizes = TINY if quick else GPU
    setup = setup_for(sizes, budget, target, kind, graph=graph)
    label = name or (_gpu_name(target) if target.type == "cuda" else "cpu")
    options = {"budget": budget, "seconds": seconds, "graph": graph, "quick": quick, "device": str(target)}
    with run(target, None, seconds) as (clock, deadline, watcher):
        result = opened("gpu", out, options, file=f"gpu-{datetime.now(UTC).date().isoformat()}-{label}")
        done = watcher.begin("gpu", setup.steps)
        for what in measure(setup, clock, deadline, result):
            done(what)
    finish(result)
    print_verdicts([Verdict.from_dict(one) for one in result.facts["goals"]])


def _gpu_name(device: "torch.device") -> str:
    import torch

    return "-".join(torch.cuda.get_device_name(device).lower().split())
