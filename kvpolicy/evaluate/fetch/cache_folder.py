"""The folder in which downloads are kept: everything in it is there whole or not at all."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from kvpolicy.errors import InputError, one_line

Tell = Callable[[str], None]  # is given one line for each step that may take long


def silent(_line: str) -> None:
    """Tell nobody."""


def cache_root() -> Path:
    """`$KVPOLICY_CACHE`, else `$XDG_CACHE_HOME/kvpolicy`, else `~/.cache/kvpolicy`. Raises InputError: no home."""
    try:
        if named := os.environ.get("KVPOLICY_CACHE"):
            return Path(named).expanduser()
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (base if base.is_absolute() else Path.home() / ".cache") / "kvpolicy"
    except RuntimeError as error:
        raise InputError(f"no folder for downloads: {one_line(error)}; set KVPOLICY_CACHE") from error


def made_once(place: Path, make: Callable[[Path], None], tell: Tell = silent) -> Path:
    """Return `place`, a folder; if it is not there, let `make` fill an empty folder, and rename that into place.

    Of several processes one makes it, and the others wait. The system drops the lock of a process that ended in the
    middle, and whoever comes next removes what that process had written.

    Raises InputError when the folder cannot be written, and whatever `make` raises; then nothing is left of it.
    """
    if place.is_dir():
        return place
    partial = place.with_name(f"{place.name}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _alone(place, tell):
            if not place.is_dir():
                _make(place, partial, make)
    except (OSError, NotImplementedError, ValueError) as error:  # a file system without locks; a NUL in the path
        raise InputError(f"{one_line(place.parent)}: {reason_of(error)}") from error
    return place


def reason_of(error: BaseException) -> str:
    """Why a file could not be written, in a few words."""
    number = getattr(error, "errno", None)
    if number == errno.ENOSPC:
        return "the disk is full"
    text = getattr(error, "strerror", None) or one_line(error)
    return f"cannot be written: {text}"


@contextmanager
def _alone(place: Path, tell: Tell) -> Iterator[None]:
    """Only one process at a time is in here, for each place."""
    lock = FileLock(f"{place}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell(f"{place.name}: waiting for another process that is fetching it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(place: Path, partial: Path, make: Callable[[Path], None]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        make(partial)
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
