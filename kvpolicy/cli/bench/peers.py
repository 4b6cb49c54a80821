"""`kvpolicy bench peers`: other libraries in environments of their own."""

from typing import TYPE_CHECKING

import typer

from kvpolicy.cli.terminal.console import line

if TYPE_CHECKING:
    from pathlib import Path

    from kvpolicy.bench.baselines.peers import Request
    from kvpolicy.bench.cases.compress import CompressSetup
    from kvpolicy.bench.protocol.case import Case
    from kvpolicy.bench.protocol.result import Result

peers = typer.Typer(no_args_is_help=True, help="Other libraries, in environments of their own.")
PEER = "kvpress, own process"


@peers.command()
def install() -> None:
    """Make an environment with kvpress in the user's cache folder; needs the package index, and minutes."""
    from kvpolicy.peers import install as make

    line(str(make(lambda text: line(text, error=True))))


@peers.command()
def show() -> None:
    """Where the environment is."""
    from kvpolicy.peers import python_of

    python = python_of()
    line(str(python) if python is not None else "not installed: kvpolicy bench peers install")


def add_peers(result: "Result", setup: "CompressSetup", python: "Path") -> None:
    """Time the presses of kvpress at the shapes of a finished run; what cannot be timed is left out by name."""
    from attrs import evolve

    from kvpolicy.bench.baselines.peers import PRESSES, ask
    from kvpolicy.errors import InputError

    cases = result.parts.get("compress", [])
    for index, case in enumerate(cases):
        if case.what not in PRESSES:
            continue
        try:
            answer = ask(python, _request(setup, case))
        except InputError as error:
            result.leave_out(f"kvpress for {case.what} at {case.length}", str(error))
            continue
        samples = tuple(seconds * case.parts for seconds in answer["samples"])
        cases[index] = evolve(case, samples={**case.samples, PEER: samples})
        result.note("peers", answer["versions"])


def _request(setup: "CompressSetup", case: "Case") -> "Request":
    import torch

    from kvpolicy.bench.baselines.peers import PRESSES, Request
    from kvpolicy.bench.protocol.case import OURS

    shape = setup.shape
    return Request(
        press=PRESSES[case.what],
        rows=setup.rows,
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        length=case.length,
        kept=int(case.shape["budget"]),
        dtype=str(setup.dtype).removeprefix("torch."),
        device=str(setup.device),
        rounds=len(case.samples[OURS]),
        warm_up=setup.protocol.warm_up,
        threads=torch.get_num_threads(),
    )
