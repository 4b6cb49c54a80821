"""The environment of the peers: made once, in the user's cache folder, beside nothing of ours."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kvpolicy.errors import InputError

REQUIREMENTS = ("transformers==5.2.*", "kvpress==0.5.*")  # kvpress allows no transformers from 5.3 on
OPTIONAL = ("optimum-quanto==0.2.*", "hqq==0.2.*")  # backends of transformers' quantised cache
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


def required_python(option: str) -> Path:
    """The Python of the environment, which an option of the command line needs. Raises InputError."""
    python = python_of()
    if python is None:
        raise InputError(f"{option}: kvpress is not installed: kvpolicy bench peers install")
    return python


def install(say: Callable[[str], None], folder: Path | None = None) -> Path:
    """Make the environment, with the torch of this one; its Python.

    An optional requirement that cannot be installed is said and left out. Raises InputError when another step fails.
    """
    environment = (folder or home()) / "kvpress"
    python = environment / "bin" / "python"
    release = torch.__version__.partition("+")[0]
    requirements = (f"torch=={release}", *REQUIREMENTS)
    every = (*requirements, *OPTIONAL)
    say(f"making {environment}")
    _run([sys.executable, "-m", "venv", "--clear", str(environment)])
    installed: list[str] = []
    for requirement in every:  # torch first, so that nothing else decides which
        say(f"installing {requirement} ({every.index(requirement) + 1} of {len(every)})")
        try:
            _run([str(python), "-m", "pip", "install", "-q", requirement, *installed])
        except InputError as error:
            if requirement not in OPTIONAL:
                raise
            say(f"left out: {requirement}: {error}")
            continue
        installed.append(requirement)
    (environment / "ready").write_text("\n".join(installed) + "\n", encoding="utf-8")
    return python


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT)  # noqa: S603 - venv and pip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{' '.join(command[:4])}: {error}") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise InputError(f"{' '.join(command[:4])} failed: {last[:_SHOWN]}")
