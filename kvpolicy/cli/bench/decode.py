"""`kvpolicy bench decode`: time of a decode step."""

from typing import Annotated

import typer

from kvpolicy.cli.bench import arguments
from kvpolicy.cli.bench.session import session
from kvpolicy.cli.terminal.options import Device


def decode(
    policy: arguments.Policies = None,
    length: arguments.Lengths = None,
    budget: arguments.Budget = 1024,
    rows: Annotated[int, typer.Option(help="Sequences that are decoded at once.")] = 1,
    model: arguments.Model = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="On a CPU, too: StaticCache with torch.compile.")
    ] = False,
    long: Annotated[
        bool, typer.Option("--long", help="Also: steps after 50 times the budget against after twice.")
    ] = False,
    graph: arguments.Graph = False,
    device: Device = "cpu",
    dtype: arguments.Dtype = None,
    rounds: arguments.Rounds = None,
    seed: arguments.Seed = 0,
    threads: arguments.Threads = None,
    seconds: arguments.Seconds = None,
    out: arguments.Out = arguments.OUT,
) -> None:
    """Time of a decode step, against full caches; of attaching without evicting; and the share of compressing."""
    from kvpolicy.bench.baselines.contenders import COMPILED
    from kvpolicy.bench.cases.decode import DecodeSetup, measure
    from kvpolicy.bench.cases.overhead import Age, Overhead
    from kvpolicy.bench.protocol.model_shapes import model_shape, random_model
    from kvpolicy.bench.sizes import DECODED
    from kvpolicy.policy import load

    target, kind, sizes = arguments.target_of(device, dtype)
    policies = arguments.policies_of(policy, budget, DECODED, **sizes.overrides)
    setup = DecodeSetup(
        policies=policies,
        shape=model_shape(model or sizes.model),
        lengths=tuple(length or sizes.contexts),
        device=target,
        dtype=kind,
        rows=rows,
        full=(*sizes.full, COMPILED) if compiled and COMPILED not in sizes.full else sizes.full,
        graph=graph,
        protocol=arguments.protocol_of(rounds or sizes.rounds, seed, warm_up=3),
    )
    old, steps = 50 * budget, len(setup.lengths) + 1 + long
    options = {"model": model or sizes.model, "budget": budget, "rows": rows}
    options |= {**arguments.options_of(kind, target, setup.protocol), "graph": graph}
    with session("decode", options, out, target, steps, threads=threads, seconds=seconds) as run:
        live = random_model(setup.shape, max(*setup.lengths, old), target, kind)
        run.collect("decode", measure(setup, live, run.clock, run.deadline, run.result.leave_out))
        whole = load(policies[0].origin or policies[0].name, budget=max(setup.lengths) + 2**20)
        attached = Overhead(whole, min(setup.lengths)).measure(live, run.clock)
        run.collect("attached without evicting", iter([("attached without evicting", [attached])]))
        if long:
            aged = Age(policies[0], 2 * budget, old).measure(live, run.clock)
            run.collect("after many tokens", iter([(f"{old} tokens", [aged])]))
