"""What an evaluation starts from: model, texts, calibration text; and the head of its record."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.data.texts import Text
from kvpolicy.evaluate.environment import machine, versions
from kvpolicy.evaluate.harness.calibrations import Calibrations
from kvpolicy.evaluate.harness.run import Evaluation
from kvpolicy.evaluate.harness.setup import EvaluationSetup
from kvpolicy.evaluate.models import place_of
from kvpolicy.evaluate.peers.client import PeerLoad, Peers
from kvpolicy.evaluate.tasks.case import Sources
from kvpolicy.evaluate.tasks.documents import token_windows
from kvpolicy.evaluate.testbed.tasks.item import EVALUATED
from kvpolicy.evaluate.testbed.training_text import training_text
from kvpolicy.integrations.transformers.saving.model_digest import model_digest
from kvpolicy.peers import required_python

_CALIBRATION_SEED = 2**40  # of generated text; evaluations have smaller ones
_PIECES, _PIECE = 8, 1024


@attrs.frozen
class Inputs:
    """What a process of an evaluation needs, all of which can be sent to another process."""

    model: str  # a name, path or id
    device: str
    dtype: torch.dtype | None
    texts: tuple[Text, ...]  # that cases are made from
    calibration_texts: tuple[Text, ...]  # that plugins are calibrated on; none of them is among `texts`
    setup: EvaluationSetup
    calibrations: Path | None = None  # a folder that keeps calibrations for other processes and later runs


def evaluation_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Inputs) -> Evaluation:
    """The evaluation of a loaded model. Raises EvaluationError when texts are too short for the cases.

    Raises InputError when peers are to be measured and are not installed.
    """
    calibrations = calibrations_of(model, tokenizer, inputs)
    return Evaluation(model, Sources(tokenizer, inputs.texts), inputs.setup, calibrations, _peers(model, inputs))


def _peers(model: PreTrainedModel, inputs: Inputs) -> Peers | None:
    if not inputs.setup.peers:
        return None
    return Peers(PeerLoad(required_python("--peer"), place_of(inputs.model), inputs.device, model.dtype))


def calibrations_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Inputs) -> Calibrations:
    """Where calibrations come from: texts that no case is made from, or what the embedded model was trained on."""

    def tokens() -> Tensor:
        if not inputs.calibration_texts:
            mixture = tuple(EVALUATED[row % len(EVALUATED)] for row in range(2 * _PIECES))
            return training_text(_CALIBRATION_SEED, mixture, _PIECE)
        pieces = token_windows(tokenizer, inputs.calibration_texts, _PIECES, _PIECE)
        return torch.tensor(pieces, device=model.device)

    return Calibrations(model, tokens, in_float32=inputs.setup.prompts_in_float32, folder=inputs.calibrations)


def head_of(model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
    """Where the numbers come from, as JSON-ready data."""
    setup = inputs.setup
    beside: dict[str, Any] = {"peers": [peer.label for peer in setup.peers]} if setup.peers else {}
    beside |= {"times": True} if setup.times else {}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "machine": machine(),
        "model": {
            "name": inputs.model,
            "digest": model_digest(model, EvaluationError),
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "texts": _digests(inputs.texts),
        "calibration_texts": _digests(inputs.calibration_texts),
        "policies": {policy.name: policy.digest for policy in setup.policies},
        "shares": [float(share) for share in setup.shares],
        "tasks": list(setup.tasks),
        "sizes": attrs.asdict(setup.sizes),
        "tokens_at_once": setup.step,
        "other_precision": setup.precision,
        "prompts_in_float32": setup.prompts_in_float32,
        **beside,
    }


def _digests(texts: Sequence[Text]) -> dict[str, str]:
    return {text.name: text.digest[:16] for text in texts}
