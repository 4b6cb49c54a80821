"""Turn a training checkpoint into the packaged weights: ``python -m tests.testbed_training publish --run DIR``."""

import json
import platform
from pathlib import Path
from typing import Annotated, Any, Final

import attrs
import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, LlamaForCausalLM

from kvpolicy.evaluate import testbed
from kvpolicy.evaluate.testbed.load import WEIGHTS, model_config, read_folder
from kvpolicy.evaluate.testbed.tasks import EVALUATED
from kvpolicy.evaluate.testbed.vocabulary import BOS, EOS, IDS, PAD
from tests.testbed_training import checkpoint
from tests.testbed_training.accuracy import Accuracy, measure
from tests.testbed_training.plot import plot_training
from tests.testbed_training.settings import Settings
from tests.testbed_training.tokenizer import build_tokenizer

OUT: Final = Path(testbed.__file__).parent / WEIGHTS
HELD_OUT_SEED: Final = 1_000_003
POINTS_KEPT: Final = 200


def publish(
    run: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = Path("testbed-run"),
    out: Annotated[Path, typer.Option(help="Folder to write.")] = OUT,
    items: Annotated[int, typer.Option(help="Held-out items per task and length.")] = 128,
    lengths: Annotated[list[int] | None, typer.Option(help="Context lengths in tokens.")] = None,
    notes: Annotated[list[str] | None, typer.Option("--note", help="What else is to be known of the run.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Write weights, tokenizer, accuracy table and loss curve of a finished run."""
    torch.set_num_threads(threads)
    state = checkpoint.read(run)
    save_model(state, out)
    table = [attrs.asdict(row) for row in _accuracies(out, items, lengths or [1024])]
    _show(table)
    record = describe(state, table, notes or [])
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot_training(state["points"], out / "training.png")


def save_model(state: dict[str, Any], out: Path) -> None:
    """Write the bfloat16 weights, both configurations and the tokenizer to ``out``."""
    model = LlamaForCausalLM(model_config())
    model.load_state_dict(checkpoint.weights(state))
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=IDS[PAD], bos_token_id=IDS[BOS], eos_token_id=IDS[EOS]
    )
    model.bfloat16().save_pretrained(out)
    build_tokenizer().save_pretrained(out)


def describe(state: dict[str, Any], table: list[dict[str, Any]], notes: list[str]) -> dict[str, Any]:
    """Return all that is to be known of the run: settings, machine, versions, loss curve, accuracies."""
    points = state["points"]
    kept = points[:: max(1, len(points) // POINTS_KEPT)]
    return {
        "settings": attrs.asdict(Settings()),
        "spent": state["counts"],
        "notes": notes,
        "held_out_seed": HELD_OUT_SEED,
        "accuracy": table,
        "machine": _machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "numpy": np.__version__},
        "points": kept,
    }  # fmt: skip


def _machine() -> dict[str, str]:
    return {"platform": platform.platform(), "cpu": _cpu_name()}


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if not listing.exists():
        return platform.processor()
    lines = listing.read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _accuracies(folder: Path, items: int, lengths: list[int]) -> list[Accuracy]:
    model, tokenizer = read_folder(folder, torch.float32)
    return [
        measure(model, tokenizer, task, seed=HELD_OUT_SEED, items=items, length=length)
        for length in lengths
        for task in EVALUATED
    ]


def _show(table: list[dict[str, Any]]) -> None:
    shown = Table("task", "length", "items", "answers right", "targets right")
    for row in table:
        shown.add_row(row["task"], *(str(row[name]) for name in ("length", "items", "answers", "targets")))
    Console().print(shown)
