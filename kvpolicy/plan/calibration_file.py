"""Tensors in a safetensors file with a digest of its contents; what is read is bounded before it is parsed."""

import hashlib
import json
import os
import stat
import struct
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvpolicy.errors import CalibrationError, shown

CONTENTS = "contents"  # the key of the digest, among what is said about the tensors
MOST_TENSORS = 4096
_LARGEST = 2**34  # bytes; a file beyond that is no calibration
_LARGEST_HEADER = 2**20  # bytes
_HEADER_SIZE = struct.Struct("<Q")
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def write(path: "str | os.PathLike[str]", tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write tensors, what is said `about` them, and the digest of both.

    Raises CalibrationError when that cannot be done.
    """
    # Copies: safetensors refuses tensors that share their memory.
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(held, os.fsdecode(path), metadata={**about, CONTENTS: _digest(held, about)})
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        raise CalibrationError(f"{_named(path)}: cannot be written: {error}") from error


def read(path: "str | os.PathLike[str]") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file in host memory, and what is said about them, the digest of its contents included.

    The digest is not compared yet, see `require_whole`. Raises CalibrationError when there is no such file, when it is
    none of safetensors, or when there is more in it than in any calibration.
    """
    name = _named(path)
    try:
        _check_header(name, os.fsdecode(path))
        with safe_open(os.fsdecode(path), framework="pt") as file:
            about = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, TypeError, ValueError, SafetensorError) as error:  # ValueError: a NUL in a path
        raise CalibrationError(f"{name}: cannot be read as safetensors: {error}") from error
    return tensors, about


def require_whole(name: str, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Raise CalibrationError unless tensors and what is said about them have the digest that was written beside."""
    said = {key: text for key, text in about.items() if key != CONTENTS}
    if CONTENTS not in about:
        raise CalibrationError(f"{name}: has no digest of its contents, as files of earlier versions: calibrate again")
    if about[CONTENTS] != _digest(tensors, said):
        raise CalibrationError(f"{name}: is damaged, its contents do not have the digest in it: calibrate again")


def _named(path: object) -> str:
    return os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else shown(path)


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """64 hex digits of what is said, and of all names, dtypes, shapes and bytes."""
    found = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _check_header(name: str, path: str) -> None:
    """Raise CalibrationError for what cannot be a calibration, before anybody parses it."""
    # Without waiting: opening a pipe, or reading a device, could last for ever.
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:  # noqa: PTH123 - by number
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise CalibrationError(f"{name}: cannot be read as safetensors: is no regular file")
        if found.st_size > _LARGEST:
            raise CalibrationError(f"{name}: is larger than any calibration")
        start = file.read(_HEADER_SIZE.size)
        if len(start) < _HEADER_SIZE.size:
            raise CalibrationError(f"{name}: cannot be read as safetensors: it has no header")
        (size,) = _HEADER_SIZE.unpack(start)
        if size > _LARGEST_HEADER:
            raise CalibrationError(
                f"{name}: cannot be read as safetensors: its header has {size} bytes, those of calibrations have "
                f"at most {_LARGEST_HEADER}"
            )
        _check_entries(name, file.read(size))


def _check_entries(name: str, header: bytes) -> None:
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{name}: cannot be read as safetensors: its header is no JSON") from error
    if not isinstance(entries, dict) or len(entries) > MOST_TENSORS:
        raise CalibrationError(
            f"{name}: cannot be read as safetensors: its header must be a mapping of at most {MOST_TENSORS} tensors"
        )
    for key, entry in entries.items():
        if key != "__metadata__" and _dtype(entry) not in _DTYPES:
            raise CalibrationError(f"{name}: cannot be read as safetensors: {shown(key)} is no tensor of a known dtype")


def _dtype(entry: Any) -> Any:
    return entry.get("dtype") if isinstance(entry, dict) else None
