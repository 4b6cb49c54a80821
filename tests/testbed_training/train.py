"""Train the testbed model from scratch: ``python -m tests.testbed_training train --out DIR``.

The run is bounded by time, not by steps: stages and learning rate follow the share of the minutes that is spent.
"""

import json
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from kvpolicy.evaluate.testbed.load import model_config
from tests.testbed_training.batches import Batch, make_batch
from tests.testbed_training.checkpoint import CHECKPOINT, Run
from tests.testbed_training.initial_weights import initialise
from tests.testbed_training.progress_display import Display
from tests.testbed_training.settings import Settings

POINT_EVERY = 50
SAVE_SECONDS = 60.0
FULL_WEIGHT = 1.0
EAGER_LENGTH = 128  # up to here the plain product of matrices trains faster on a CPU than the fused attention


def train_testbed(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint and the log.")] = Path("testbed-run"),
    minutes: Annotated[float, typer.Option(help="Training time, summed over resumed runs.")] = 60.0,
    resume: Annotated[bool, typer.Option(help="Continue from the checkpoint in OUT.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = "auto",
) -> None:
    """Train the testbed model and leave a checkpoint; ``publish`` turns it into the packaged weights."""
    settings = Settings()
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    torch.set_num_threads(settings.threads)
    run = start(settings, target)
    if resume and (out / CHECKPOINT).exists():
        run.restore(out)
    with Display(60 * minutes) as display:
        train(run, settings, 60 * minutes, out, display)


def start(settings: Settings, device: torch.device) -> Run:
    """Return a fresh run: the seeded model and its optimizer, on ``device``."""
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(model_config())
    initialise(model)
    torch.nn.Module.to(model, device)
    decay = settings.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=settings.betas, weight_decay=decay, fused=True)
    return Run(model, optimizer)


def train(run: Run, settings: Settings, seconds: float, out: Path, display: Display) -> None:
    """Train until ``seconds`` are spent; save every minute and at the end."""
    began = time.monotonic() - run.seconds
    saved = run.seconds
    while run.seconds < seconds:
        progress = run.seconds / seconds
        stage = settings.stage(progress)
        run.model.set_attn_implementation("eager" if stage.length <= EAGER_LENGTH else "sdpa")
        batch = make_batch(settings.seed, run.step, stage.mixture, stage.length)
        rate = settings.rate(run.step, progress)
        loss, hits = optimize(run, batch, rate, settings.clip_norm)
        run.step += 1
        run.tokens += batch.tokens.numel()
        run.seconds = time.monotonic() - began
        if run.step % POINT_EVERY == 0:
            point = _point(run, stage.length, rate, loss, accuracy(batch, hits))
            run.points.append(point)
            display.show(run, point)
            _log(out, point)
        if run.seconds - saved > SAVE_SECONDS:
            saved = run.seconds
            run.save(out)
    run.save(out)


def optimize(run: Run, batch: Batch, rate: float, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Take one step; return the loss and which tokens were predicted right, bool [B, T-1]."""
    device = run.model.device
    tokens, weights = batch.tokens.to(device), batch.weights.to(device)[:, 1:]
    with _autocast(device):
        logits = run.model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    wanted = tokens[:, 1:]
    losses = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(weights)
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), clip_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad()
    return loss.detach(), (logits.argmax(-1) == wanted).cpu()


def accuracy(batch: Batch, hits: Tensor) -> dict[str, float]:
    """Return per task the share of right predictions among the tokens that count fully."""
    counted = batch.weights[:, 1:] >= FULL_WEIGHT
    shares = {}
    for task in dict.fromkeys(batch.tasks):
        chosen = torch.tensor([name == task for name in batch.tasks])
        shares[task] = (hits & counted)[chosen].sum().item() / max(1, counted[chosen].sum().item())
    return shares


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16)


def _point(run: Run, length: int, rate: float, loss: Tensor, shares: dict[str, float]) -> dict[str, Any]:
    rounded = {task: round(share, 5) for task, share in shares.items()}
    counts = {"step": run.step, "tokens": run.tokens, "seconds": round(run.seconds, 1), "length": length}
    return {**counts, "rate": rate, "loss": round(loss.item(), 5), "accuracy": rounded}


def _log(out: Path, point: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(point) + "\n")
