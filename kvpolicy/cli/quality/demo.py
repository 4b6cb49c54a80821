"""`kvpolicy demo`: a model with its full cache and with several policies, side by side."""

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli.quality.evaluate import inputs_of, measure, parse_share, slow_in_16_bits
from kvpolicy.cli.terminal.console import line, out, print_json
from kvpolicy.cli.terminal.files import make_folder, write_text
from kvpolicy.cli.terminal.options import MODEL, Json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvpolicy.evaluate.harness.record import EvaluationRecord
    from kvpolicy.evaluate.harness.setup import EvaluationSetup
    from kvpolicy.evaluate.harness.start import Inputs
    from kvpolicy.evaluate.report.retention import Kept
    from kvpolicy.policy import Policy

POLICIES = tuple(f"kvpolicy:{name}" for name in ("streaming_llm", "h2o", "snapkv", "rkv", "blend"))
REAL_POLICIES = tuple(f"kvpolicy:{name}" for name in ("streaming_llm", "snapkv", "rkv", "blend3", "headkv_centred"))
REAL_TASKS = ("text", "needle", "needle-unseen")  # small models answer them with the full cache
SHARES = ("25%", "10%")
RETAINED = Fraction(1, 4)
CELLS, RESULTS, RETENTION, TRADEOFF = "demo.jsonl", "results.json", "retention.png", "tradeoff.png"


def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for pictures and results.")] = Path("demo-results"),
    model: Annotated[str, typer.Option(help=MODEL)] = "testbed",
    policy: Annotated[list[str] | None, typer.Option(help="A policy's name or file; may be repeated.")] = None,
    share: Annotated[list[str] | None, typer.Option(help="Share of the full cache's bytes; may be repeated.")] = None,
    items: Annotated[int | None, typer.Option(help="Contexts of a task; by default 16, of a real model 3.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a context; by default 1024, else 2048.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the questions.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Two short contexts a task: does it run?")] = False,
    json: Json = False,
) -> None:
    """Compare policies with the full cache: answers and predictions at equal bytes held; and draw it."""
    from attrs import evolve

    from kvpolicy.evaluate.report.data import summary_data
    from kvpolicy.evaluate.report.plots import MISSING, can_plot
    from kvpolicy.evaluate.report.table import table_of

    setup = _setup(model, policy, share or SHARES, items, length, seed, quick=quick)
    inputs = evolve(inputs_of(model, None, "cpu", None, setup), dtype=None)
    make_folder(out_dir, "--out ")
    (out_dir / CELLS).unlink(missing_ok=True)  # a demo begins anew
    record, kept = _run(inputs, out_dir / CELLS)
    results = {**summary_data(record), **({} if kept is None else {"retention": _kept_data(kept)})}
    _write(out_dir, results, record, kept)
    print_json(results) if json else out().print(table_of(record))
    if not can_plot():
        line(MISSING, error=True)
    line(f"written to {out_dir}: {', '.join(sorted(path.name for path in out_dir.iterdir()))}", error=True)


def _policies(names: "Sequence[str]") -> "tuple[Policy, ...]":
    from kvpolicy.errors import InputError
    from kvpolicy.policy import load

    policies = tuple(load(name) for name in names)
    if any(policy.name == "full" for policy in policies):
        raise InputError("the full cache is part of every comparison: leave the policy 'full' out")
    return policies


def _setup(
    model: str,
    names: "Sequence[str] | None",
    shares: "Sequence[str]",
    items: int | None,
    length: int | None,
    seed: int,
    *,
    quick: bool,
) -> "EvaluationSetup":
    from kvpolicy.evaluate.harness.setup import EvaluationSetup
    from kvpolicy.evaluate.models import TESTBED
    from kvpolicy.evaluate.tasks.case import TaskSizes
    from kvpolicy.evaluate.tasks.names import TESTBED_TASKS

    embedded = model == TESTBED
    few, short = (2, 128 if embedded else 256) if quick else (16, 1024) if embedded else (3, 2048)
    documents, tokens = few if items is None else items, short if length is None else length
    return EvaluationSetup(
        _policies(names or (POLICIES if embedded else REAL_POLICIES)),
        TESTBED_TASKS if embedded else REAL_TASKS,
        tuple(map(parse_share, shares)),
        TaskSizes(documents=documents, length=tokens, scored=32 if quick else 128, seed=seed),
        prompts_in_float32=slow_in_16_bits("cpu"),
        times=not embedded,
    )


def _run(inputs: "Inputs", file: Path) -> "tuple[EvaluationRecord, Kept | None]":
    """Measure; and for the embedded model, whose words can be shown, what some of the policies keep of a prompt."""
    from kvpolicy.evaluate.harness.start import calibrations_of
    from kvpolicy.evaluate.models import TESTBED
    from kvpolicy.evaluate.report.retention import retention

    setup = inputs.setup
    record, live, tokenizer = measure(inputs, file, 1)
    if inputs.model != TESTBED:
        return record, None
    few = sorted({0, len(setup.policies) // 2, len(setup.policies) - 1})
    pictured = [setup.policies[index] for index in few]
    made = calibrations_of(live, tokenizer, inputs)
    kept = retention(live, tokenizer, pictured, made, share=RETAINED, seed=setup.sizes.seed)
    return record, kept if kept.by_policy else None


def _write(folder: Path, results: dict[str, Any], record: "EvaluationRecord", kept: "Kept | None") -> None:
    from json import dumps

    from kvpolicy.evaluate.report.heatmap import plot_retention
    from kvpolicy.evaluate.report.pictures import plot_tradeoff
    from kvpolicy.evaluate.report.plots import can_plot

    write_text(folder / RESULTS, dumps(results, indent=1, ensure_ascii=False) + "\n")
    if can_plot():
        plot_tradeoff(record, folder / TRADEOFF)
        if kept is not None:
            plot_retention(kept, folder / RETENTION)


def _kept_data(kept: "Kept") -> dict[str, Any]:
    return {
        "task": kept.item.task,
        "tokens": list(kept.tokens),
        "answer_follows_from": list(kept.matter),
        "policies": [
            {
                "policy": one.policy.name,
                "share": float(one.share),
                "right": one.right,
                "written": one.text,
                "held_by_layer_and_token": [[round(value, 4) for value in row] for row in one.held.tolist()],
            }
            for one in kept.by_policy
        ],
    }
