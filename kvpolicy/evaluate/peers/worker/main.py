"""Reads requests from stdin, a line of JSON each, and writes the answers to stdout; all else goes to stderr.

The first request names the model. Each later one names a peer, a file of cases, and where the tensors of the answer
are to be put.
"""

import json
import logging
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from .caches import UnknownPeerError, cache_of
from .run import CaseRun

_NAMED = ("kvpress", "transformers", "torch", "optimum-quanto", "hqq")
_WARM_UP = 64  # tokens


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not stand among the answers
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    lines = iter(sys.stdin)
    model = _model(json.loads(next(lines)))
    _answer(answers, {"versions": _versions(), "parameters": model.num_parameters()})
    for line in lines:
        _answer(answers, _measured(model, json.loads(line)))


def _model(request: dict[str, Any]) -> Any:
    torch.set_num_threads(request["threads"])
    dtype, device = getattr(torch, request["dtype"]), torch.device(request["device"])
    model: Any = AutoModelForCausalLM.from_pretrained(request["model"], dtype=dtype)
    model = model.to(device).eval()
    with torch.inference_mode():  # the first forward of a process takes longer than others
        model(torch.zeros(1, _WARM_UP, dtype=torch.long, device=device), use_cache=False, logits_to_keep=1)
    return model


def _measured(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What the peer gave, or why it gave nothing: it must not cost the others."""
    cases = json.loads(Path(request["cases"]).read_text(encoding="utf-8"))
    try:
        make = cache_of(request["peer"], model, request["ratio"])
        run = CaseRun(model, make, cases)
        with torch.inference_mode():
            facts, logits = run.measured()
    except UnknownPeerError as error:
        return {"error": str(error)}
    except Exception as error:  # noqa: BLE001 - a peer raises whatever it likes
        return {"error": f"{type(error).__name__}: {error}"}
    save_file(logits, request["tensors"])
    return facts


def _versions() -> dict[str, str]:
    found = {}
    for name in _NAMED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "torch": str(torch.__version__)}


def _answer(answers: Any, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
