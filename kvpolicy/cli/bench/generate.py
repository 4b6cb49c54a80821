"""`kvpolicy bench generate`: tokens per second of whole generations."""

from typing import Annotated

import typer

from kvpolicy.cli.bench import arguments
from kvpolicy.cli.bench.session import session
from kvpolicy.cli.terminal.options import Device


def generate(
    policy: arguments.Policies = None,
    budget: arguments.Budget = 1024,
    memory: Annotated[str | None, typer.Option(help="Bytes that a batch may take: 2GiB.")] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of the prompt.")] = None,
    new: Annotated[int | None, typer.Option(help="Tokens that are generated.")] = None,
    points: Annotated[
        int | None, typer.Option(help="Time full caches at so many lengths only; 0 generates every token.")
    ] = None,
    model: arguments.Model = None,
    graph: arguments.Graph = False,
    device: Device = "cpu",
    dtype: arguments.Dtype = None,
    rounds: Annotated[int, typer.Option(help="Times that everything is timed, in turns; 3 at least.")] = 3,
    seed: arguments.Seed = 0,
    threads: arguments.Threads = None,
    seconds: arguments.Seconds = None,
    out: arguments.Out = arguments.OUT,
) -> None:
    """Tokens per second and memory, every contender at the largest batch that fits the same memory."""
    from kvpolicy.bench.generation import GenerateSetup, measure
    from kvpolicy.bench.protocol.model_shapes import model_shape, random_model
    from kvpolicy.bench.sizes import DECODED

    target, kind, sizes = arguments.target_of(device, dtype)
    protocol = arguments.protocol_of(rounds, seed)
    setup = GenerateSetup(
        policies=arguments.policies_of(policy, budget, DECODED, **sizes.overrides),
        shape=model_shape(model or ("8b" if sizes.model == "8b" else "small")),
        prompt=sizes.prompt if prompt is None else prompt,
        new=sizes.new if new is None else new,
        memory=arguments.bytes_of(memory or sizes.memory),
        device=target,
        dtype=kind,
        full=sizes.full,
        graph=graph,
        points=sizes.points if points is None else points,
        rounds=protocol.rounds,
        seed=seed,
    )
    options = {"budget": budget, "memory": memory or sizes.memory, "prompt": setup.prompt, "new": setup.new}
    options |= {**arguments.options_of(kind, target, protocol), "graph": graph}
    steps = len(setup.policies) + len(setup.full) + 1
    with session("generate", options, out, target, steps, threads=threads, seconds=seconds) as run:
        live = random_model(setup.shape, setup.length, target, kind)
        run.collect("generate", measure(setup, live, run.clock, run.deadline, run.result.leave_out))
