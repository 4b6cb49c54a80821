"""`kvpolicy recommend`: which policy, for a model, a context and the memory that there is."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli.quality.evaluate import inputs_of, slow_in_16_bits
from kvpolicy.cli.terminal.console import line, print_json, tell
from kvpolicy.cli.terminal.options import MODEL, Device, Dtype, Json

if TYPE_CHECKING:
    from kvpolicy.evaluate.harness.record import Cell
    from kvpolicy.evaluate.harness.run import Unit
    from kvpolicy.evaluate.harness.start import Inputs
    from kvpolicy.evaluate.recommend.candidates import Memory
    from kvpolicy.evaluate.recommend.choose import Choice
    from kvpolicy.plan.calibration import Calibration
    from kvpolicy.policy import Policy


def recommend(
    model: Annotated[str, typer.Option(help=MODEL)],
    context: Annotated[str, typer.Option(help="Tokens of a sequence, such as 8192 or 32k.")],
    memory: Annotated[
        str | None, typer.Option(help="Bytes for the caches of all sequences, such as 2GiB; or give --max-kl.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    max_kl: Annotated[
        float | None, typer.Option(help="KL divergence from the full cache that is allowed, nats a token.")
    ] = None,
    text: Annotated[list[Path] | None, typer.Option(help="A text file; may be repeated. By default essays.")] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="A candidate's name or file; may be repeated. By default a few of ours.")
    ] = None,
    pieces: Annotated[int | None, typer.Option(help="Pieces of text; by default 4, with --max-kl 16.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a piece, at most those of the context.")] = 2048,
    scored: Annotated[int, typer.Option(help="Tokens behind each piece whose predictions are compared.")] = 128,
    out: Annotated[Path | None, typer.Option(help="Write the policy there instead of printing it.")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Measure a few policies on a model and a text, and give the one to use, as YAML, with its evidence.

    With --out, what the policy has to know of the model is written beside it, with the ending .safetensors.
    """
    import torch

    from kvpolicy.evaluate.harness.start import evaluation_of
    from kvpolicy.evaluate.models import load_model

    tokens, size = parse_tokens(context), None if memory is None else _bytes(memory)
    _require(model, size, max_kl, batch, out)
    count = pieces if pieces is not None else 4 if max_kl is None else 16
    inputs = _inputs(model, text, policy, (count, min(length, tokens), scored), device, dtype)
    live, tokenizer = load_model(model, torch.device(device), inputs.dtype, tell)
    room = _memory(live, size, tokens, batch)
    if room is not None and room.is_enough:
        line(f"a full cache takes {_human(room.full_bytes + room.other_bytes)} of {_human(room.size)}: use no policy")
        return
    inputs = _with_shares(inputs, room)
    evaluation = evaluation_of(live, tokenizer, inputs)
    choice = _choose(evaluation, room, max_kl)
    fitted = _fitted(choice, evaluation, tokens)
    if json:
        print_json(_data(choice, fitted))
        return
    _write(fitted, evaluation.calibrations.of(fitted), _evidence(choice, inputs, room), out)
    _table(choice)


def _require(model: str, size: int | None, max_kl: float | None, batch: int, out: Path | None) -> None:
    """Raise InputError for options that do not go together, before anything is fetched."""
    from kvpolicy.errors import InputError
    from kvpolicy.evaluate.models import TESTBED

    if (size is None) == (max_kl is None):
        raise InputError("give --memory or --max-kl, one of them")
    if max_kl is not None and not 0 < max_kl < float("inf"):
        raise InputError(f"--max-kl must be above 0: {max_kl}")
    if batch < 1:
        raise InputError(f"--batch must be at least 1: {batch}")
    if model == TESTBED:
        raise InputError("--model testbed: knows no text; give a model that does, such as smollm2")
    if out is not None and out.suffix == ".safetensors":
        raise InputError(f"--out {out}: the policy is a YAML file; what it needs to know of the model has this ending")


def _write(policy: "Policy", measured: "Calibration | None", words: Sequence[str], out: Path | None) -> None:
    """The policy with its evidence, on the screen or as a file; then what was measured for it is written beside it."""
    from kvpolicy.cli.terminal.files import write_text

    beside = None if out is None or (out.exists() and not out.is_file()) else out.with_name(f"{out.stem}.safetensors")
    if measured is not None:
        where = "" if beside is None else f"; what was measured here is in {beside.name}"
        words = [*words, f"It must be calibrated on the model: `kvpolicy calibrate`{where}."]
    yaml = "".join(f"# {sentence}\n" for sentence in words) + policy.to_yaml()
    if out is None:
        line(yaml.rstrip())
        return
    write_text(out, yaml)
    line(f"written to {out}", error=True)
    if measured is not None and beside is not None:
        measured.save(beside)
        line(f"its calibration is written to {beside}", error=True)


def parse_tokens(text: str) -> int:
    """A number of tokens, with k for 1024. Raises InputError."""
    from kvpolicy.errors import InputError, shown

    digits, factor = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10 and int(digits)):
        raise InputError(f"--context must be tokens, such as 8192 or 32k: {shown(text)}")
    return int(digits) * factor


def _bytes(text: str) -> int:
    from kvpolicy.errors import InputError, shown
    from kvpolicy.spec.budget import Budget

    budget = Budget.parse(text)
    if budget is None or budget.size is None:
        raise InputError(f"--memory must be bytes, such as 2GiB: {shown(text)}")
    return budget.size


def _inputs(
    model: str,
    files: list[Path] | None,
    names: list[str] | None,
    sizes: tuple[int, int, int],
    device: str,
    dtype: str | None,
) -> "Inputs":
    """What is measured. Of the default candidates those are left out whose text to calibrate on cannot be had."""
    from attrs import evolve

    from kvpolicy.errors import InputError
    from kvpolicy.evaluate.harness.setup import EvaluationSetup
    from kvpolicy.evaluate.recommend.candidates import CANDIDATES
    from kvpolicy.evaluate.recommend.choose import TASK
    from kvpolicy.evaluate.tasks.case import TaskSizes
    from kvpolicy.policy import load

    documents, length, scored = sizes
    setup = EvaluationSetup(
        tuple(map(load, names or CANDIDATES)),
        (TASK,),
        sizes=TaskSizes(documents=documents, length=length, scored=scored),
        precision=False,
        prompts_in_float32=slow_in_16_bits(device),
    )
    uncalibrated = evolve(setup, policies=tuple(one for one in setup.policies if not one.spec.calibrated))
    if names or not files:
        return inputs_of(model, files, device, dtype, setup)
    inputs = inputs_of(model, files, device, dtype, uncalibrated)
    try:
        return inputs_of(model, files, device, dtype, setup)
    except InputError as error:
        left_out = ", ".join(one.name for one in setup.policies if one.spec.calibrated)
        line(f"not tried: {left_out}, calibrated on essays: {error}", error=True)
        return inputs


def _memory(model: Any, size: int | None, tokens: int, batch: int) -> "Memory | None":
    from kvpolicy.evaluate.recommend.candidates import memory_of
    from kvpolicy.policy import load

    if size is None:
        return None
    return memory_of(load("kvpolicy:full").compile(model), model.config, size, tokens, batch)


def _with_shares(inputs: "Inputs", room: "Memory | None") -> "Inputs":
    from attrs import evolve

    from kvpolicy.evaluate.recommend.choose import LADDER

    shares = LADDER if room is None else (room.share.limit_denominator(10**6),)
    return evolve(inputs, setup=evolve(inputs.setup, shares=shares))


def _choose(evaluation: Any, room: "Memory | None", max_kl: float | None) -> "Choice":
    from kvpolicy.cli.terminal.progress import cells
    from kvpolicy.evaluate.harness.workers import run_here
    from kvpolicy.evaluate.recommend.choose import choose_by_bound, choose_by_bytes

    def run(units: "Sequence[Unit]") -> "Sequence[Cell]":
        measured: list[Cell] = []
        with cells(sum(len(unit.contenders) for unit in units), measured.append) as add:
            run_here(evaluation, units, add)
        return measured

    if room is not None:
        return choose_by_bytes(evaluation, run, evaluation.setup.shares[0])
    return choose_by_bound(evaluation, run, max_kl or 0.0)


def _fitted(choice: "Choice", evaluation: Any, tokens: int) -> "Policy":
    """The chosen policy, sized for the context that it will serve."""
    from kvpolicy.evaluate.fitting.fit import fit_calibrated

    policy = next(one for one in evaluation.setup.policies if one.name == choice.policy)
    share = Fraction(1) if choice.share is None else choice.share
    return fit_calibrated(policy, evaluation.model, share=share, length=tokens, calibrate=evaluation.calibrations.of)


def _evidence(choice: "Choice", inputs: "Inputs", room: "Memory | None") -> list[str]:
    """What speaks for the policy, in sentences."""
    from kvpolicy.evaluate.harness.setup import percent
    from kvpolicy.evaluate.recommend.choose import METRIC

    sizes, best = inputs.setup.sizes, next(one for one in choice.lines if one.policy == choice.policy)
    found = best.estimate(METRIC)
    pieces = f"{sizes.documents} pieces of {sizes.length} tokens, {sizes.scored} predicted behind each"
    words = [f"Measured by kvpolicy recommend on {inputs.model}: {pieces}."]
    if choice.risk is not None:
        risk = choice.risk
        words.append(
            f"At {percent(risk.share)} of the full cache's bytes, the KL divergence of a further piece of such text, "
            f"counted as at most {risk.clipped_at:g}, is at most {risk.bound:g} nats a token on average "
            f"({risk.pieces} pieces that chose nothing else: {risk.mean:.3g}); single pieces may exceed it."
        )
        return words
    words.append(
        f"KL divergence from the full cache {found.mean:.3g} nats a token [{found.low:.3g}, {found.high:.3g}] at "
        f"{best.held_share:.1%} of its bytes."
    )
    if choice.same:
        words.append(f"The evidence does not separate it from: {', '.join(choice.same)}.")
    if room is not None:
        words.append(
            f"Sized for {room.batch} sequences of {room.context} tokens in {_human(room.size)}; a full cache takes "
            f"{_human(room.full_bytes + room.other_bytes)}."
        )
    return words


def _table(choice: "Choice") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from kvpolicy.cli.terminal.console import err
    from kvpolicy.evaluate.recommend.choose import METRIC

    table = Table(box=SIMPLE_HEAD, padding=0)
    for heading in ("cache", "held", "pieces", "KL", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "cache" else "right", no_wrap=True)
    for one in choice.lines:
        found = one.estimate(METRIC)
        numbers = f"{len(one.groups)}", f"{found.mean:.3g}", f"{found.low:.3g} to {found.high:.3g}"
        table.add_row(one.label, f"{one.held_share:.1%}", *numbers)
    err().print(table)


def _data(choice: "Choice", fitted: "Policy") -> dict[str, Any]:
    from attrs import asdict

    from kvpolicy.evaluate.recommend.choose import METRIC

    return {
        "policy": fitted.to_yaml(),
        "name": choice.policy,
        "share": None if choice.share is None else float(choice.share),
        "not_separated_from": list(choice.same),
        "risk": None if choice.risk is None else asdict(choice.risk),
        "compared": [
            {
                "policy": one.policy,
                "share": one.share,
                "held_share": one.held_share,
                "pieces": len(one.groups),
                **asdict(one.estimate(METRIC)),
            }
            for one in choice.lines
        ],
    }


def _human(size: int) -> str:
    from kvpolicy.plan.explain.units import human_bytes

    return human_bytes(size)
