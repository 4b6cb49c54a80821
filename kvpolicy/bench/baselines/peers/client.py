"""Asks the worker in a peer's environment for times."""

import json
import subprocess
from pathlib import Path
from typing import Any

import attrs

from kvpolicy.errors import InputError

PRESSES = {"snapkv": "SnapKVPress", "tova": "TOVAPress", "streaming_llm": "StreamingLLMPress"}
_WORKER = Path(__file__).with_name("worker.py")
_SHOWN = 300  # characters of an error


@attrs.frozen
class Request:
    """One compression: T entries of B rows to N, in one layer, by the press of that name."""

    press: str
    rows: int
    query_heads: int
    kv_heads: int
    head_dim: int
    length: int
    kept: int
    dtype: str
    device: str
    rounds: int
    warm_up: int
    threads: int


def ask(python: Path, request: Request, seconds: float = 600.0) -> dict[str, Any]:
    """Samples in seconds and versions, as the worker says them. Raises InputError when it does not."""
    text = json.dumps(attrs.asdict(request))
    try:
        done = subprocess.run(  # noqa: S603 - the Python that `install` made, and our own file
            [str(python), "-I", str(_WORKER)], input=text, capture_output=True, text=True, check=False, timeout=seconds
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"kvpress: {error}") from error
    if done.returncode:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise InputError(f"kvpress: {last[:_SHOWN]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
