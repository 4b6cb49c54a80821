"""Asks the worker of the peers for a group of cases, and measures its answers as those of our own caches."""

import json
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kvpolicy.errors import EvaluationError, InputError, one_line
from kvpolicy.evaluate.harness.costs import TIMED_STEPS
from kvpolicy.evaluate.harness.measure import GroupRun
from kvpolicy.evaluate.harness.measured import Costs, Measured
from kvpolicy.evaluate.harness.scoring import scored, turns_of
from kvpolicy.evaluate.peers.names import Peer
from kvpolicy.evaluate.tasks.case import Answer, Case
from kvpolicy.peers import PeerProcess

_WORKER = Path(__file__).with_name("worker")
_START = f"import sys; sys.path.insert(0, {str(_WORKER.parent)!r}); from worker.main import main; main()"
_SECONDS = 3600.0  # for one peer on one group of cases


@attrs.frozen(eq=False)
class PeerLoad:
    """What the worker loads: the weights in a folder, or of an id, as this process has loaded them."""

    python: Path  # of the environment
    model: str
    device: str
    dtype: torch.dtype


class Peers:
    """The worker, which is started when it is first needed and ends with `close`."""

    def __init__(self, load: PeerLoad, arguments: tuple[str, ...] = ("-c", _START), seconds: float = _SECONDS) -> None:
        greeting = {
            "model": load.model,
            "device": load.device,
            "dtype": str(load.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }
        self._process = PeerProcess(load.python, arguments, greeting, seconds)

    @property
    def versions(self) -> dict[str, str]:
        """Of the libraries in the environment; nothing before the first answer."""
        found: dict[str, str] = self._process.greeted.get("versions", {})
        return found

    def close(self) -> None:
        """End the worker."""
        self._process.close()

    def measured(self, peer: Peer, share: Fraction | None, run: GroupRun) -> Measured:
        """What a peer gave on the cases of a group, whose full cache has been measured. Raises InputError.

        The bytes held are those right after the longest prompt, as a peer compresses nothing but that.
        """
        if run.prompts.unmanaged:
            raise EvaluationError("compared on models all of whose layers hold the whole context only")
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            answer, logits = self._asked(peer, share, run, Path(folder))
        try:
            values, texts = _values(run, answer["tokens"], logits)
            costs = Costs(
                prompt_share=answer["prompt_bytes"] / run.full_bytes_of(run.prompt_tokens),
                end_share=answer["end_bytes"] / run.full_bytes_of(answer["end_tokens"]),
                prefill_seconds=answer["prefill_seconds"],
                step_seconds=answer["step_seconds"],
            )
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise InputError(f"its answer does not fit the cases: {one_line(error)}") from error
        return Measured(
            values,
            time.perf_counter() - started,
            answer["prompt_bytes"],
            run.full_bytes_of(run.prompt_tokens),
            texts,
            costs,
            self.versions,
        )

    def _asked(
        self, peer: Peer, share: Fraction | None, run: GroupRun, folder: Path
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The answer, and the logits [t, V] of texts by the number of their case."""
        cases, tensors = folder / "cases.json", folder / "logits.safetensors"
        cases.write_text(json.dumps(_cases(run)), encoding="utf-8")
        ratio = None if share is None else float(1 - share)
        request = {"peer": peer.name, "ratio": ratio, "cases": str(cases), "tensors": str(tensors)}
        try:
            answer = self._process.ask(request)
            found = {} if "error" in answer else load_file(tensors)
        except (OSError, SafetensorError) as error:
            raise InputError(f"its logits cannot be read: {one_line(error)}") from error
        if "error" in answer:
            raise InputError(one_line(answer["error"]))
        return answer, found


def _cases(run: GroupRun) -> dict[str, Any]:
    """A group as JSON-ready data: token ids and how far to go on."""
    return {
        "prompts": [list(prompt) for prompt in dict.fromkeys(case.prompt for case in run.cases)],
        "cases": [_case(case, row) for case, row in zip(run.cases, run.rows, strict=True)],
        "step": run.step,
        "stop": run.stop,
        "timed": TIMED_STEPS,
    }


def _case(case: Case, row: int) -> dict[str, Any]:
    """A text, or turns of questions with how many tokens are written at most."""
    if isinstance(case, Answer):
        turns = [{"question": list(turn.question), "new_tokens": turn.new_tokens} for turn in turns_of(case)]
        return {"prompt": row, "turns": turns}
    return {"prompt": row, "text": list(case.text[:-1])}


def _values(
    run: GroupRun, tokens: list[list[list[int]]], logits: dict[str, Tensor]
) -> tuple[dict[str, list[float]], tuple[str, ...]]:
    """Values by metric in the order of the cases, and answers, from what was written and predicted elsewhere."""
    values, texts = [], []
    for index, case in enumerate(run.cases):
        if isinstance(case, Answer):
            written = [run.decoded(turn) for turn in tokens[index]]
            values.append(scored(case, written))
            texts.append("\n".join(written))
        else:
            values.append(run.compared_with_full(index, logits[str(index)]))
            texts.append("")
    return {name: [found[name] for found in values] for name in values[0]}, tuple(texts)
