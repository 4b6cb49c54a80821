"""`kvpolicy bench`: is it fast and lean? Each benchmark is a subcommand."""

from typing import Annotated

import typer

from kvpolicy.cli.bench.claims import gates, gpu
from kvpolicy.cli.bench.options import (
    OUT,
    Budget,
    Dtype,
    Graph,
    Lengths,
    Model,
    Out,
    Policies,
    Rounds,
    Seconds,
    Seed,
    Threads,
    bytes_of,
    heads_of,
    options_of,
    place,
    policies_of,
    protocol_of,
    run,
    shipped,
)
from kvpolicy.cli.bench.output import finish, opened
from kvpolicy.cli.bench.peers import add_peers, required_peer
from kvpolicy.cli.bench.peers import peers as peers_app
from kvpolicy.cli.options import Device

bench = typer.Typer(no_args_is_help=True, help="Measure time and memory against baselines and against the floor.")


@bench.command()
def compress(
    policy: Policies = None,
    length: Lengths = None,
    budget: Budget = 1024,
    rows: Annotated[int, typer.Option(help="Sequences that are compressed at once.")] = 1,
    layers: Annotated[int | None, typer.Option(help="Layers that are compressed at once.")] = None,
    heads: Annotated[str, typer.Option(help="Query heads, KV heads, head dim.")] = "32,8,128",
    keys: Annotated[
        str, typer.Option(help="shared (a mean per head) or isotropic, the worst case for R-KV.")
    ] = "shared",
    peers: Annotated[bool, typer.Option("--peers", help="Time kvpress as well; see `kvpolicy bench peers`.")] = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    rounds: Rounds = None,
    seed: Seed = 0,
    threads: Threads = None,
    seconds: Seconds = None,
    out: Out = OUT,
) -> None:
    """Time of one compression per layer, against plain torch and against the floor."""
    from kvpolicy.bench.cases.compress import CompressSetup, measure
    from kvpolicy.bench.cases.filled_layers import KEYS
    from kvpolicy.bench.protocol.model_shapes import attention_shape
    from kvpolicy.bench.protocol.sizes import POLICIES
    from kvpolicy.errors import InputError

    if keys not in KEYS:
        raise InputError(f"--keys must be one of {', '.join(KEYS)}: {keys!r}")
    python = required_peer() if peers else None
    target, kind, sizes = place(device, dtype)
    setup = CompressSetup(
        policies=policies_of(policy, budget) if policy else shipped(POLICIES, budget),
        shape=attention_shape(layers or sizes.layers, *heads_of(heads)),
        lengths=tuple(length or sizes.lengths),
        device=target,
        dtype=kind,
        rows=rows,
        keys=keys,
        protocol=protocol_of(rounds or sizes.rounds, seed),
    )
    options = {"budget": budget, "rows": rows, "heads": heads, "keys": keys, **options_of(kind, target, setup.protocol)}
    with run(target, threads, seconds) as (clock, deadline, watcher):
        result = opened("compress", out, options)
        done = watcher.begin("compress", len(setup.lengths) * len(setup.policies))
        for what, case in measure(setup, clock, deadline, result.leave_out):
            if case is not None:
                result.add("compress", case)
            done(what)
        if python is not None:
            add_peers(result, setup, python)
    finish(result)


@bench.command()
def decode(
    policy: Policies = None,
    length: Lengths = None,
    budget: Budget = 1024,
    rows: Annotated[int, typer.Option(help="Sequences that are decoded at once.")] = 1,
    model: Model = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="On a CPU, too: StaticCache with torch.compile.")
    ] = False,
    long: Annotated[
        bool, typer.Option("--long", help="Also: steps after 50 times the budget against after twice.")
    ] = False,
    graph: Graph = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    rounds: Rounds = None,
    seed: Seed = 0,
    threads: Threads = None,
    seconds: Seconds = None,
    out: Out = OUT,
) -> None:
    """Time of a decode step, against full caches; of attaching without evicting; and the share of compressing."""
    from kvpolicy.bench.baselines.contenders import COMPILED
    from kvpolicy.bench.cases.decode import DecodeSetup, measure
    from kvpolicy.bench.cases.overhead import Age, Overhead
    from kvpolicy.bench.protocol.model_shapes import model_shape, random_model
    from kvpolicy.bench.protocol.sizes import DECODED

    target, kind, sizes = place(device, dtype)
    policies = policies_of(policy, budget) if policy else shipped(DECODED, budget, **sizes.overrides)
    full = (*sizes.full, COMPILED) if compiled and COMPILED not in sizes.full else sizes.full
    setup = DecodeSetup(
        policies=policies,
        shape=model_shape(model or sizes.model),
        lengths=tuple(length or sizes.contexts),
        device=target,
        dtype=kind,
        rows=rows,
        full=full,
        graph=graph,
        protocol=protocol_of(rounds or sizes.rounds, seed, warm_up=3),
    )
    old = 50 * budget
    options = {
        "model": model or sizes.model,
        "budget": budget,
        "rows": rows,
        **options_of(kind, target, setup.protocol),
    }
    with run(target, threads, seconds) as (clock, deadline, watcher):
        result = opened("decode", out, {**options, "graph": graph})
        live = random_model(setup.shape, max(*setup.lengths, old), target, kind)
        done = watcher.begin("decode", len(setup.lengths) + 1 + long)
        for what, cases in measure(setup, live, clock, deadline, result.leave_out):
            for case in cases:
                result.add("decode", case)
            done(what)
        whole = policies_of([policies[0].origin or policies[0].name], max(setup.lengths) + 2**20)[0]
        result.add("attached without evicting", Overhead(whole, min(setup.lengths)).measure(live, clock))
        done("attached without evicting")
        if long:
            result.add("after many tokens", Age(policies[0], 2 * budget, old).measure(live, clock))
            done(f"{old} tokens")
    finish(result)


@bench.command()
def generate(
    policy: Policies = None,
    budget: Budget = 1024,
    memory: Annotated[str | None, typer.Option(help="Bytes that a batch may take: 2GiB.")] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of the prompt.")] = None,
    new: Annotated[int | None, typer.Option(help="Tokens that are generated.")] = None,
    points: Annotated[
        int | None, typer.Option(help="Time full caches at so many lengths only; 0 generates every token.")
    ] = None,
    model: Model = None,
    graph: Graph = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    rounds: Annotated[int, typer.Option(help="Times that everything is timed, in turns; 3 at least.")] = 3,
    seed: Seed = 0,
    threads: Threads = None,
    seconds: Seconds = None,
    out: Out = OUT,
) -> None:
    """Tokens per second and memory, every contender at the largest batch that fits the same memory."""
    from kvpolicy.bench.generation import GenerateSetup, measure
    from kvpolicy.bench.protocol.model_shapes import model_shape, random_model
    from kvpolicy.bench.protocol.sizes import DECODED

    target, kind, sizes = place(device, dtype)
    setup = GenerateSetup(
        policies=policies_of(policy, budget) if policy else shipped(DECODED, budget, **sizes.overrides),
        shape=model_shape(model or ("8b" if sizes.model == "8b" else "small")),
        prompt=sizes.prompt if prompt is None else prompt,
        new=sizes.new if new is None else new,
        memory=bytes_of(memory or sizes.memory),
        device=target,
        dtype=kind,
        full=sizes.full,
        graph=graph,
        points=sizes.points if points is None else points,
        rounds=protocol_of(rounds, seed).rounds,
        seed=seed,
    )
    options = {"budget": budget, "memory": memory or sizes.memory, "prompt": setup.prompt, "new": setup.new}
    options = {**options, **options_of(kind, target, protocol_of(rounds, seed)), "graph": graph}
    with run(target, threads, seconds) as (clock, deadline, watcher):
        result = opened("generate", out, options)
        live = random_model(setup.shape, setup.length, target, kind)
        done = watcher.begin("generate", len(setup.policies) + len(setup.full) + 1)
        for what, cases in measure(setup, live, clock, deadline, result.leave_out):
            for case in cases:
                result.add("generate", case)
            done(what)
    finish(result)


bench.command()(gates)
bench.command()(gpu)
bench.add_typer(peers_app, name="peers")
