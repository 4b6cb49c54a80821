"""A run's state on disk, so that an interrupted training continues where it was."""

from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from torch import Tensor
from transformers import LlamaForCausalLM

CHECKPOINT = "checkpoint.pt"


@define
class Run:
    """What changes while training: model, optimizer, steps, tokens and seconds spent, points of the loss curve."""

    model: LlamaForCausalLM
    optimizer: torch.optim.Optimizer
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    points: list[dict[str, Any]] = field(factory=list)

    def save(self, folder: Path) -> None:
        """Write the state to ``folder``, never leaving half a file under the final name."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counts": {"step": self.step, "tokens": self.tokens, "seconds": self.seconds},
            "points": self.points,
        }
        torch.save(state, folder / "checkpoint.new")
        (folder / "checkpoint.new").replace(folder / CHECKPOINT)

    def restore(self, folder: Path) -> None:
        """Take over the state that `save` wrote."""
        state = read(folder)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.points = state["points"]
        for name, count in state["counts"].items():
            setattr(self, name, count)


def read(folder: Path) -> dict[str, Any]:
    """Return the saved state, on the CPU."""
    state: dict[str, Any] = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
    return state


def weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the model's tensors by name."""
    tensors: dict[str, Tensor] = state["model"]
    return tensors
