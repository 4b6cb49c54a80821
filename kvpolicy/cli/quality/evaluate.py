"""`kvpolicy evaluate`: policies on a model and texts, at equal bytes, beside the full cache."""

import shutil
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli.terminal.console import line, out, print_json, tell
from kvpolicy.cli.terminal.files import make_folder, write_text
from kvpolicy.cli.terminal.options import MODEL, Device, Dtype, Json

if TYPE_CHECKING:
    from kvpolicy.evaluate.data.texts import Text
    from kvpolicy.evaluate.harness.record import EvaluationRecord
    from kvpolicy.evaluate.harness.setup import EvaluationSetup
    from kvpolicy.evaluate.harness.start import Inputs
    from kvpolicy.evaluate.peers import Peer
    from kvpolicy.policy import Policy

RECORD, PAGE, PICTURE = "cells.jsonl", "evaluation.md", "tradeoff.png"
SHARES = ("25%", "12.5%", "6.25%")
_QUICK: dict[str, Any] = {"documents": 1, "length": 160, "scored": 16, "questions": 1}


def evaluate(
    model: Annotated[str, typer.Option(help=MODEL)] = "testbed",
    policy: Annotated[
        list[str] | None, typer.Option(help="A policy's name or file, changed by +key=value; may be repeated.")
    ] = None,
    share: Annotated[list[str] | None, typer.Option(help="Shares of the full cache's bytes: `25%,12.5%`.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Tasks: `text,needle`. `list` prints all.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="A text file; may be repeated. By default essays.")] = None,
    documents: Annotated[int | None, typer.Option(help="Contexts of a task; by default 4, of the testbed 32.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a context; by default 2048, testbed 1024.")] = None,
    scored: Annotated[int | None, typer.Option(help="Tokens predicted behind a context; by default 128.")] = None,
    questions: Annotated[int | None, typer.Option(help="About each context, if several; by default 4.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the questions.")] = 1,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="Caches of other libraries, `all`, or `list`. See `bench peers install`."),
    ] = None,
    times: Annotated[bool, typer.Option("--times", help="Also time prefill and decode steps, once a policy.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes, each with a copy of the model.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="One short context a task: does it run?")] = False,
    out_dir: Annotated[
        Path,
        typer.Option("--out", help="Folder of the record, which a run goes on with; it may add to it."),
    ] = Path("evaluation-results"),
    record: Annotated[
        Path | None, typer.Option("--from", help="Measure nothing: render the record in this folder.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Measure policies, by default all installed ones, on a model: answers and predictions at equal bytes held."""
    from kvpolicy.evaluate.harness.record import read_record

    if task == ["list"]:
        _list_tasks()
        return
    if peer == ["list"]:
        _list_peers()
        return
    if record is not None:
        _render(record, read_record(record / RECORD), json=json)
        return
    _require_jobs(jobs)
    sizes = {"documents": documents, "length": length, "scored": scored, "questions": questions, "seed": seed}
    peers = _peers(_each(peer))
    setup = _setup(model, policy, share, task, sizes, device, peers, times=times, quick=quick)
    inputs = inputs_of(model, text, device, dtype, setup)
    make_folder(out_dir, "--out ")
    _render(out_dir, measure(inputs, out_dir / RECORD, jobs)[0], json=json)


def _require_jobs(jobs: int) -> None:
    """Raise InputError for a number of processes that is none."""
    from kvpolicy.errors import InputError

    if jobs < 1:
        raise InputError(f"--jobs must be at least 1: {jobs}")


def _list_tasks() -> None:
    from kvpolicy.evaluate.tasks.names import GYM, TASKS

    for name, task in TASKS.items():
        line(f"{name:18} {task.summary}")
    line(f"{GYM + 'NAME':18} questions of a generator of reasoning-gym, such as chain_sum")


def _list_peers() -> None:
    from kvpolicy.evaluate.peers import PEERS

    for peer in PEERS.values():
        line(f"{peer.name:18} {peer.library}: {peer.summary}")


def _peers(names: list[str]) -> "tuple[Peer, ...]":
    """The peers of those names. Raises InputError for an unknown one, and when their environment is not there."""
    from kvpolicy.evaluate.peers import peers_of
    from kvpolicy.peers import required_python

    found = peers_of(names)
    if found:
        required_python("--peer")
    return found


def _setup(
    model: str,
    policies: list[str] | None,
    shares: list[str] | None,
    tasks: list[str] | None,
    sizes: dict[str, int | None],
    device: str,
    peers: "tuple[Peer, ...]",
    *,
    times: bool,
    quick: bool,
) -> "EvaluationSetup":
    from kvpolicy.evaluate.harness.setup import EvaluationSetup
    from kvpolicy.evaluate.models import TESTBED
    from kvpolicy.evaluate.tasks.case import TaskSizes
    from kvpolicy.evaluate.tasks.names import TESTBED_TASKS, TEXT_TASKS, require_tasks
    from kvpolicy.stages.registry.plugins import registry

    defaults = {"documents": 32, "length": 1024} if model == TESTBED else {"documents": 4, "length": 2048}
    given = {name: value for name, value in sizes.items() if value is not None}
    names = tuple(_each(tasks) or (TESTBED_TASKS if model == TESTBED else TEXT_TASKS))
    require_tasks(names, testbed=model == TESTBED)
    return EvaluationSetup(
        tuple(map(loaded, policies or registry().policies())),
        names,
        tuple(map(parse_share, _each(shares) or SHARES)),
        TaskSizes(**{**defaults, **(_QUICK if quick else {}), **given}),
        peers=peers,
        times=times,
        prompts_in_float32=slow_in_16_bits(device),
    )


def _each(texts: list[str] | None) -> list[str]:
    """The values of an option that may be repeated, or have commas between several."""
    return [part.strip() for text in texts or () for part in text.split(",")]


def loaded(text: str) -> "Policy":
    """A policy by name or file, with other values of top-level keys: `snapkv+merge=window_fit`.

    Its name is the text. Raises what `kvpolicy.load` raises, and InputError for a change that is none.
    """
    import attrs
    import yaml

    from kvpolicy.errors import InputError, one_line, shown
    from kvpolicy.policy import load

    source, *changes = text.split("+")
    if not changes or _is_file(text):
        return load(text)
    values: dict[str, object] = {}
    for change in changes:
        key, separator, value = change.partition("=")
        if not separator:
            raise InputError(f"--policy {shown(text)}: must be NAME+KEY=VALUE: {shown(change)}")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--policy {shown(text)}: {key}: is no YAML: {one_line(error)}") from error
    changed = load(source, **values)
    return attrs.evolve(changed, spec=attrs.evolve(changed.spec, name=text))


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # longer than a name may be
        return False


def slow_in_16_bits(device: str) -> bool:
    """Whether a long prompt takes several times as long in bfloat16 as in float32: CPUs without AVX-512."""
    import torch

    return device == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")


def parse_share(text: str) -> Fraction:
    """A share given on the command line. Raises InputError."""
    from kvpolicy.errors import InputError, ParameterError
    from kvpolicy.evaluate.fitting.fit import share_of

    try:
        return share_of(text)
    except ParameterError as error:
        raise InputError(f"--{error}") from error


def inputs_of(
    model: str, files: list[Path] | None, device: str, dtype: str | None, setup: "EvaluationSetup"
) -> "Inputs":
    """What is measured, with texts and dtype as they are given or by default. Raises InputError."""
    import torch

    from kvpolicy.cli.terminal.models import device_of, dtype_of
    from kvpolicy.evaluate.harness.start import Inputs
    from kvpolicy.evaluate.models import NAMES, TESTBED, config_of

    device_of(device)
    if model not in NAMES:
        config_of(model)  # a mistyped path is told before texts are fetched
    # Of the embedded model the bytes compare with those of a 16-bit cache.
    chosen = dtype_of(dtype) or (torch.bfloat16 if model == TESTBED else None)
    texts, calibration = _texts(model, files, calibrated=any(one.spec.calibrated for one in setup.policies))
    return Inputs(model, device, chosen, texts, calibration, setup)


def _texts(model: str, files: list[Path] | None, *, calibrated: bool) -> "tuple[tuple[Text, ...], tuple[Text, ...]]":
    """Texts for the cases, and others to calibrate on: essays, of which the cases leave some alone.

    Essays are read only where they are needed.
    """
    from kvpolicy.errors import InputError
    from kvpolicy.evaluate.data.texts import essays, held_back, user_text
    from kvpolicy.evaluate.models import TESTBED

    if model == TESTBED:
        if files:
            raise InputError("--text: the embedded model knows no words but its own: give another --model")
        return (), ()
    given = tuple(map(user_text, files or ()))
    if given and not calibrated:
        return given, ()
    every = essays(tell)
    to_calibrate = held_back(every)
    return given or every[: -len(to_calibrate)], to_calibrate


def measure(inputs: "Inputs", file: Path, jobs: int) -> "tuple[EvaluationRecord, Any, Any]":
    """Measure what the record in a file lacks; returns the record, the model and its tokenizer. Raises InputError.

    Calibrations stay beside the file until all is measured.
    """
    import attrs
    import torch

    from kvpolicy.cli.terminal.progress import cells
    from kvpolicy.evaluate.harness.record import RecordFile
    from kvpolicy.evaluate.harness.start import evaluation_of, head_of
    from kvpolicy.evaluate.harness.workers import run_here, run_in_processes
    from kvpolicy.evaluate.models import load_model

    calibrations = file.parent / "calibrations"
    inputs = attrs.evolve(inputs, calibrations=calibrations)
    model, tokenizer = load_model(inputs.model, torch.device(inputs.device), inputs.dtype, tell)
    evaluation = evaluation_of(model, tokenizer, inputs)
    record = RecordFile(file, head_of(model, inputs))
    units = evaluation.units({cell.key for cell in record.record.cells})
    with cells(sum(len(unit.contenders) for unit in units), record.add) as add:
        if jobs == 1:
            run_here(evaluation, units, add)
        else:
            run_in_processes(inputs, units, add, jobs)
    shutil.rmtree(calibrations, ignore_errors=True)
    return record.record, model, tokenizer


def _render(folder: Path, record: "EvaluationRecord", *, json: bool) -> None:
    from kvpolicy.evaluate.report.data import summary_data
    from kvpolicy.evaluate.report.page import page_of
    from kvpolicy.evaluate.report.pictures import plot_tradeoff
    from kvpolicy.evaluate.report.plots import MISSING, can_plot
    from kvpolicy.evaluate.report.table import table_of

    picture = PICTURE if can_plot() else None
    write_text(folder / PAGE, page_of(record, picture))
    if picture is not None:
        plot_tradeoff(record, folder / picture)
    else:
        line(MISSING, error=True)
    if json:
        print_json(summary_data(record))
    else:
        out().print(table_of(record))
    line(f"written to {folder}: {', '.join(name for name in (RECORD, PAGE, picture) if name)}", error=True)
