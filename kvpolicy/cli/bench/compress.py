"""`kvpolicy bench compress`: time of one compression per layer."""

from typing import Annotated

import typer

from kvpolicy.cli.bench import arguments
from kvpolicy.cli.bench.peers import add_peers
from kvpolicy.cli.bench.session import session
from kvpolicy.cli.terminal.options import Device


def compress(
    policy: arguments.Policies = None,
    length: arguments.Lengths = None,
    budget: arguments.Budget = 1024,
    rows: Annotated[int, typer.Option(help="Sequences that are compressed at once.")] = 1,
    layers: Annotated[int | None, typer.Option(help="Layers that are compressed at once.")] = None,
    heads: Annotated[str, typer.Option(help="Query heads, KV heads, head dim.")] = "32,8,128",
    keys: Annotated[
        str, typer.Option(help="shared (a mean per head) or isotropic, the worst case for R-KV.")
    ] = "shared",
    peers: Annotated[bool, typer.Option("--peers", help="Time kvpress as well; see `kvpolicy bench peers`.")] = False,
    device: Device = "cpu",
    dtype: arguments.Dtype = None,
    rounds: arguments.Rounds = None,
    seed: arguments.Seed = 0,
    threads: arguments.Threads = None,
    seconds: arguments.Seconds = None,
    out: arguments.Out = arguments.OUT,
) -> None:
    """Time of one compression per layer, against plain torch and against the floor."""
    from kvpolicy.bench.cases.compress import CompressSetup, measure
    from kvpolicy.bench.cases.filled_layers import KEYS
    from kvpolicy.bench.protocol.model_shapes import attention_shape
    from kvpolicy.bench.sizes import POLICIES
    from kvpolicy.errors import InputError
    from kvpolicy.peers import required_python

    if keys not in KEYS:
        raise InputError(f"--keys must be one of {', '.join(KEYS)}: {keys!r}")
    python = required_python("--peers") if peers else None
    target, kind, sizes = arguments.target_of(device, dtype)
    setup = CompressSetup(
        policies=arguments.policies_of(policy, budget, POLICIES),
        shape=attention_shape(layers or sizes.layers, *arguments.heads_of(heads)),
        lengths=tuple(length or sizes.lengths),
        device=target,
        dtype=kind,
        rows=rows,
        keys=keys,
        protocol=arguments.protocol_of(rounds or sizes.rounds, seed),
    )
    options = {"budget": budget, "rows": rows, "heads": heads, "keys": keys}
    options |= arguments.options_of(kind, target, setup.protocol)
    steps = len(setup.lengths) * len(setup.policies)
    with session("compress", options, out, target, steps, threads=threads, seconds=seconds) as run:
        run.collect("compress", measure(setup, run.clock, run.deadline, run.result.leave_out))
        if python is not None:
            add_peers(run.result, setup, python)
