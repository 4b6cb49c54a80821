"""Options that several benchmarks share, and their conversion to policies, devices and sizes."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from kvpolicy.bench.protocol.interleave import Repetitions
    from kvpolicy.bench.sizes import Sizes
    from kvpolicy.policy import Policy

Policies = Annotated[
    list[str] | None, typer.Option("--policy", help="A policy's name or file; may be repeated. By default several.")
]
Lengths = Annotated[list[int] | None, typer.Option("--length", help="Tokens of context; may be repeated.")]
Budget = Annotated[int, typer.Option(help="Entries per KV head that every policy keeps.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default what suits the device.")]
Rounds = Annotated[int | None, typer.Option(help="Times that everything is timed, in turns; 3 at least.")]
Seed = Annotated[int, typer.Option(help="Decides the order of the turns.")]
Threads = Annotated[int | None, typer.Option(help="Threads on a CPU; by default as many as PyTorch takes.")]
Seconds = Annotated[float | None, typer.Option(help="Stop beginning new cases after so long.")]
Out = Annotated[Path, typer.Option(help="Folder for the record, the table and the picture.")]
Model = Annotated[str | None, typer.Option(help="Shape of the model, whose weights are random: tiny, small, 267m, 8b.")]
Graph = Annotated[bool, typer.Option("--graph", help="Attach policies with static shapes.")]
OUT = Path("bench-results")


def target_of(device: str, dtype: str | None) -> "tuple[torch.device, torch.dtype, Sizes]":
    """Device, dtype and default sizes. Raises InputError."""
    from kvpolicy.bench.sizes import sizes_for
    from kvpolicy.cli.terminal.models import device_of, dtype_of

    target = device_of(device)
    sizes = sizes_for(target)
    kind = dtype_of(dtype or sizes.dtype)
    return target, kind, sizes  # type: ignore[return-value]


def policies_of(
    names: Iterable[str] | None, budget: int, defaults: Sequence[str], **overrides: Any
) -> "tuple[Policy, ...]":
    """Policies by name or file; without names those of some shipped ones that can keep so few entries."""
    from kvpolicy.cli.terminal.console import line
    from kvpolicy.errors import KVPolicyError
    from kvpolicy.policy import load

    if names:
        return tuple(load(name, budget=budget) for name in names)
    policies: list[Policy] = []
    for name in defaults:
        try:
            policies.append(load(f"kvpolicy:{name}", budget=budget, **overrides))
        except KVPolicyError as error:
            line(f"not measured: {name}: {error}", error=True)
    return tuple(policies)


def heads_of(text: str) -> tuple[int, int, int]:
    """Query heads, KV heads, head dim. Raises InputError."""
    from kvpolicy.errors import InputError

    try:
        query_heads, kv_heads, head_dim = map(int, text.split(","))
    except ValueError as error:
        raise InputError(f"--heads must be three numbers, 32,8,128: {text!r}") from error
    return query_heads, kv_heads, head_dim


def bytes_of(text: str) -> int:
    """A number of bytes. Raises InputError."""
    from kvpolicy.errors import InputError
    from kvpolicy.spec.budget import Budget

    parsed = Budget.parse(text)
    if parsed is None or parsed.size is None:
        raise InputError(f"--memory must be bytes, 2GiB: {text!r}")
    return parsed.size


def protocol_of(rounds: int, seed: int, warm_up: int = 1) -> "Repetitions":
    """Raises InputError for too few rounds."""
    from kvpolicy.bench.protocol.interleave import LEAST_ROUNDS, Repetitions
    from kvpolicy.errors import InputError

    if rounds < LEAST_ROUNDS:
        raise InputError(f"--rounds must be at least {LEAST_ROUNDS}: {rounds}")
    return Repetitions(rounds, warm_up, seed)


def options_of(dtype: "torch.dtype", device: "torch.device", protocol: "Repetitions") -> dict[str, Any]:
    """Dtype, device and protocol, as they are written to the result."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "rounds": protocol.rounds,
        "warm-up": protocol.warm_up,
        "seed": protocol.seed,
    }
