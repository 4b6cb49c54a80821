"""The environment of a peer: made once, in the user's cache folder, beside nothing of ours."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kvpolicy.errors import InputError

REQUIREMENTS = ("transformers==5.2.*", "kvpress==0.5.*")  # kvpress allows no transformers from 5.3 on
_TIMEOUT = 1800.0  # seconds of one step
_SHOWN = 300  # characters of an error


def home() -> Path:
    """Where peers live; `KVPOLICY_PEERS` names another folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("KVPOLICY_PEERS") or cache / "kvpolicy" / "peers")


def python_of(folder: Path | None = None) -> Path | None:
    """The Python of the environment, None while it has not been made."""
    python = (folder or home()) / "kvpress" / "bin" / "python"
    return python if (python.parent.parent / "ready").exists() else None


def install(say: Callable[[str], None], folder: Path | None = None) -> Path:
    """Make the environment, with the torch of this one; its Python. Raises InputError when a step fails."""
    environment = (folder or home()) / "kvpress"
    python = environment / "bin" / "python"
    release = torch.__version__.partition("+")[0]
    requirements = (f"torch=={release}", *REQUIREMENTS)
    say(f"making {environment}")
    _run([sys.executable, "-m", "venv", "--clear", str(environment)])
    for count, requirement in enumerate(requirements):  # torch first, so that nothing else decides which
        say(f"installing {requirement} ({count + 1} of {len(requirements)})")
        _run([str(python), "-m", "pip", "install", "-q", requirement, *requirements[:count]])
    (environment / "ready").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    return python


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT)  # noqa: S603 - venv and pip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{' '.join(command[:4])}: {error}") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise InputError(f"{' '.join(command[:4])} failed: {last[:_SHOWN]}")
